"""The schema of results.json."""
