"""A model on a server that speaks OpenAI's API, measured over HTTP."""
