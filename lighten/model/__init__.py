"""Opening a source, and streaming its layers."""
