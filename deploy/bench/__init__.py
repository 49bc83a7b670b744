"""Candidates paired with the baseline, each in a process of its own."""
