"""Taking weights, channels, heads and layers out."""
