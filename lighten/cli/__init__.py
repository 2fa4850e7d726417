"""Commands that are more than a call: parse, call, print."""
