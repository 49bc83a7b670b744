"""Artifacts on disk: the manifest, reading, finding and writing them, and the description of their tensors."""
