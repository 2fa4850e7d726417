"""What llama.cpp's files say of each family of models: one row for a family, read in both directions."""
