"""A session in a separate process."""
