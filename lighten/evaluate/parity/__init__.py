"""An export against its source, token by token."""
