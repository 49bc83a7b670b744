"""Dynamic batching over any session."""
