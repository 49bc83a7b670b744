"""The lock of this process around the capture of a CUDA graph.

A capture empties the caches of torch's allocator and forbids its thread much of CUDA, so captures follow one another: those of
engines, of eager sessions and of torch.compile.
"""

import threading

capturing = threading.Lock()
"""Held by whatever captures a CUDA graph, from before its warm-up until the capture has ended."""
