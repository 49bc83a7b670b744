"""What goes into a model: images and calibration data."""
