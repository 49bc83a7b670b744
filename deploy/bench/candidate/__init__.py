"""What is timed: one artifact on one backend in a process of its own."""
