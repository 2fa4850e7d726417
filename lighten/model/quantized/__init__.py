"""Formats of quantized checkpoints: a file for each says what is known of it, and how its linears are unpacked."""
