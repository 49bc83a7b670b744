"""Running artifacts: sessions on any backend, batching, and worker processes."""
