"""Tasks with right answers."""
