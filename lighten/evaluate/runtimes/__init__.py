"""What runs a model, and the choice of it by what lies on disk."""
