"""`lighten recommend`: which of the measured artifacts to take, and why."""
