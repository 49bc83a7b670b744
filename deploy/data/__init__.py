"""Reads the data for models: images and calibration data."""
