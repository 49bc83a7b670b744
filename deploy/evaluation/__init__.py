"""Measures the accuracy of artifacts, compares two, and predicts single images."""
