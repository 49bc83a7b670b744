"""A session in a process of its own."""
