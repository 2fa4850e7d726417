"""What the machine could do at most."""
