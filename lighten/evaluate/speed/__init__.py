"""Time, memory and energy of a runtime."""
