"""Artifacts on the disk: the manifest, reading, finding, writing, and what describes their tensors."""
