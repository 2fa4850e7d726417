"""What linears read: second moments, in one model, or in a model and its quantized twin side by side."""
