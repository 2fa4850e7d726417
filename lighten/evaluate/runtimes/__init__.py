"""What runs a model, and the choice of it by the files on disk."""
