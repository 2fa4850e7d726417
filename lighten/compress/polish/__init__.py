"""Polishing: scales of a quantized model that are trained on what its source says, while its codes stay."""
