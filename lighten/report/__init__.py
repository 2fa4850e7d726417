"""Results, and the reports made from them. This room reads results only; it measures nothing and loads no model."""
