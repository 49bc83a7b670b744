"""The lock of this process around the capture of a CUDA graph.

A capture empties the caches of torch's allocator and forbids its thread much of CUDA, so captures follow one another: those of
engines, of eager sessions and of torch.compile. A wait for the whole device, by any thread, ends a capture that is under way.

Not kept apart from captures: what other libraries wait for (ONNX Runtime's search for convolutions, TensorRT's builder), modules
whose inner shapes depend on data, so that cuDNN searches at any run, and pycuda, which waits for the device to free memory.
"""

import threading

capturing = threading.RLock()
"""Held by whatever captures a CUDA graph, from before its warm-up until the capture has ended, and by whatever waits for the whole
device. A thread may take it again: what then ends its own capture is an error, and no deadlock."""
