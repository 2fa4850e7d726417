"""Likeness of embeddings to those of the source."""
