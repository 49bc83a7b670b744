"""Accuracy and predictions of an artifact, and the gate that compares two."""
