"""What is learned about a model by running text through it."""
