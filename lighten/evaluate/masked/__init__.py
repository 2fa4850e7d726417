"""Gaps in texts, filled by an encoder."""
