"""A directory that runs on a device."""
