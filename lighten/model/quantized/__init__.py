"""Formats of quantized checkpoints: each file has the facts of a format, and unpacks its linears."""
