"""Which programs open an artifact."""
