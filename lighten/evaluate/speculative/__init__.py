"""Decoding with a draft."""
