"""The sweep over the calibration data, and the methods that work on (W, Gram)."""
