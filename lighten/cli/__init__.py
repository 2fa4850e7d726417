"""The commands, one file for each: they parse, call and print."""
