"""The CUDA graphs of `torch.compile` (its modes reduce-overhead and max-autotune), for many threads and streams.

torch keeps the graphs of a thread in one tree, in memory that they share, and expects that one thread warms up, records and
replays them on one stream. The handles and tuned plans of cuDNN and cuBLAS belong to a thread too: a graph that is recorded by
another thread than the one that warmed it up makes them while it records, which ends the recording.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from deploy.engine.cuda.capturing import capturing

FIRST_RUNS = 3
"""The runs of a shape that are the recorder's: the first compiles and warms up, the second records, the third may end it."""


class GraphTrees:
    """Runs functions that `torch.compile` made, one at a time in the process, because their graphs share memory.

    The first runs of each function are those of one thread of the process, the recorder; a replay is of the thread that calls.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="deploy record", initializer=own_trees)
        self._done: dict[torch.device, torch.cuda.Event] = {}  # the end of the last run

    def run(
        self, function: Callable[..., Any], inputs: Sequence[torch.Tensor], device: torch.device, *, first: bool
    ) -> list[torch.Tensor]:
        """The results of `function` on the current stream, in new tensors. first: it is one of the FIRST_RUNS of its shape.

        function: takes the inputs, CUDA tensors on `device`, and returns a list of tensors.
        """
        stream = torch.cuda.current_stream(device)

        def work() -> list[torch.Tensor]:
            with torch.inference_mode(), torch.cuda.stream(stream):
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return [x.clone() for x in function(*inputs)]

        with self._lock:
            if device in self._done:
                stream.wait_event(self._done[device])
            if first:
                with capturing:
                    results = self._recorder.submit(work).result()
            else:
                results = work()
            self._done[device] = stream.record_event()
            return results


def own_trees() -> None:
    """Give this thread trees of its own. torch 2.11 gives them to the thread that imports the module, and fails in others."""
    from torch._inductor import cudagraph_trees  # slow, and imported by torch.compile alone

    if not hasattr(cudagraph_trees.local, "tree_manager_containers"):
        cudagraph_trees.local.tree_manager_containers = {}
        cudagraph_trees.local.tree_manager_locks = defaultdict(threading.Lock)


graph_trees = GraphTrees()
"""The graphs of this process."""
