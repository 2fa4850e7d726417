"""Arithmetic that knows nothing of models."""
