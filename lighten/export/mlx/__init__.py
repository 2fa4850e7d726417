"""Directories for MLX."""
