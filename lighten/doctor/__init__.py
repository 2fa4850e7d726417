"""`lighten doctor`: what a model, a machine and a calibration text are good for."""
