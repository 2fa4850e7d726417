"""What a pass of text through a model measures."""
