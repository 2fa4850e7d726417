"""`lighten recommend`: which of the artifacts that were measured to take, and why."""
