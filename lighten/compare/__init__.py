"""`lighten compare`: what changed from one version, variant or model to another, and whether it is allowed."""
