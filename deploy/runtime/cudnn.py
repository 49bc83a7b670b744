"""cuDNN's search for the fastest convolution of each shape, `torch.backends.cudnn.benchmark`.

TensorRT and ONNX Runtime search too; without it, torch runs what a heuristic chooses.
"""

import threading

import torch


class CudnnBenchmark:
    """The setting, which is one for the whole process: on while a session on a GPU is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = False

    def hold(self) -> None:
        """Turn the search on until `release`."""
        with self._lock:
            if not self._holders:
                self._before = torch.backends.cudnn.benchmark
                torch.backends.cudnn.benchmark = True
            self._holders += 1

    def release(self) -> None:
        """Undo one `hold`; the last one restores the setting from before the first."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                torch.backends.cudnn.benchmark = self._before


cudnn_benchmark = CudnnBenchmark()
"""The setting of this process."""
