"""Speed of models that read whole sentences."""
