"""A candidate: one artifact on one backend, in its own process."""
