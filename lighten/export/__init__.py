"""Writing a model in the format of the runtime that will serve it."""
