"""Reads images, collects statistics, and chooses thresholds. Imports neither `deploy` nor `models`."""
