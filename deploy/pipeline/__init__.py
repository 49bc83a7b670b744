"""The stages, each `stage(artifact, out, options) -> Artifact`."""
