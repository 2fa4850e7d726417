"""Removing weights, channels, heads and layers."""
