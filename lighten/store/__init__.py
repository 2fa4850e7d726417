"""Artifacts on disk: written once, never changed, found by key."""
