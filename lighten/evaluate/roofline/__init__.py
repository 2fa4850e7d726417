"""The maximum speed of the machine."""
