"""What a model, a machine and a text are good for."""
