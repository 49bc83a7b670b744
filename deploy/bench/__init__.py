"""Benchmarks: artifacts on backends, in separate processes, in turns with a baseline."""
