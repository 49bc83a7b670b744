"""cuDNN's search for the fastest convolution of each shape, `torch.backends.cudnn.benchmark`.

TensorRT and ONNX Runtime search too; without it, torch runs what a heuristic chooses.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from deploy.engine.cuda.capturing import capturing

_KNOWN = nullcontext()
_LAYOUTS = 1024
"""The largest number of layouts that a thread remembers of a session."""


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


class FirstRuns(threading.local):
    """Keeps the first run of a layout in a thread apart from captures of CUDA graphs, for one session.

    cuDNN searches then, with plans that belong to the thread, and waits for the whole device (`time_sorted_plan` of
    cudnn-frontend, which torch calls): that ends the capture of any thread.
    """

    def __init__(self) -> None:
        self._layouts: set[Any] = set()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> AbstractContextManager[object]:
        """What a run on these inputs is made in. A run that has failed is a first one again."""
        layout = tuple([(x.shape, x.stride()) for x in inputs])
        return _KNOWN if layout in self._layouts else self._first(layout)

    @contextmanager
    def _first(self, layout: Any) -> Iterator[None]:
        with capturing:
            yield
        if len(self._layouts) >= _LAYOUTS:
            self._layouts.clear()
        self._layouts.add(layout)
