"""A simulated GPU in place of the real libraries: torch.cuda, cuda-python, pycuda, TensorRT and TensorRT-RTX, for one test.

It is stricter than a GPU. Where CUDA leaves behaviour undefined, and a real GPU may give right results for years, it raises RuleError:

- Each stream has a clock, which events, waits and the legacy default stream join. Memory knows its uses: one that conflicts with a use
  which the clock does not know to be over is an error that names both (`work`, `memory`, `machine`).
- Work is done as late as it may be: when the host waits for it. What is read too early is poison (`guards`).
- Freed memory is handed on at once where CUDA and torch may do so, and never used again otherwise (`allocation`, `torch_memory`).
- Captures forbid what CUDA forbids; graphs replay addresses, shapes and the state of contexts as they were (`captures`, `contexts`).
- Engines compute with ONNX Runtime (`plans`). Calls take the arguments of the real bindings (`test_signatures`).

`rules` holds the rules as probes, which run on a real GPU too; `faults` the mistakes that it finds.

What it does not model:

- Order between threads of the host: their calls count in the order in which they happened, whether or not a lock made that order.
- Time: what overlaps, what is fast, priorities; times of events grow, and mean nothing.
- How the host uses pinned memory, but for changes while work on it is pending; managed memory; copies between GPUs, and peer access.
- Memory nodes, child graphs, conditional nodes and updates of graphs; a graph is done in the order of its capture, on one stream.
- cudaMallocAsync that waits for another stream to get at its memory: it takes new memory instead.
- Fragmentation, split blocks and size classes of torch's allocator; memory is as large as it is asked for, in steps of 512 bytes.
- torch beyond `torch_front`: operators run on the CPU's memory, autograd and compiled code do not; of several GPUs only the current one.
- TensorRT's choice of kernels, its auxiliary streams, plugins, weight streaming and refitting; numbers are those of FP32 on a CPU.
- What no document and no run on a GPU has settled: whether addresses outlive a change of profile (here they do), and whether an output
  allocator is asked at every run (here it is).
- pycuda's signatures are from its documentation: it cannot be imported without a driver.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from deploy.engine import cuda
from tests.simulator.errors import RuleError
from tests.simulator.machine import Machine
from tests.simulator.pycuda_front import PycudaFront
from tests.simulator.runtime_front import RuntimeFront
from tests.simulator.tensorrt_front import TensorRTFront
from tests.simulator.torch_front import TorchFront
from tests.simulator.work import join


class Simulated:
    """The GPU and the fronts of it. library: what deploy uses it through."""

    def __init__(self, patch: pytest.MonkeyPatch, *, library: str | None = None, devices: int = 2, total: int = 1 << 26) -> None:
        self.machine = Machine(devices=devices, total=total)
        self.torch = TorchFront(self.machine)
        self.runtime = RuntimeFront(self.machine)
        self.pycuda = PycudaFront(self.machine)
        self.trt = TensorRTFront(self.machine)
        self.rtx = TensorRTFront(self.machine, "tensorrt-rtx", "1.7.1")
        self.torch.install(patch)
        patch.setitem(sys.modules, "tensorrt", self.trt)
        patch.setitem(sys.modules, "tensorrt_rtx", self.rtx)
        patch.setitem(sys.modules, "pycuda", types.SimpleNamespace(driver=self.pycuda))
        patch.setitem(sys.modules, "pycuda.driver", self.pycuda)
        patch.setitem(sys.modules, "deploy.engine.cuda.pycuda_device", types.ModuleType("forgotten when the test ends"))
        del sys.modules["deploy.engine.cuda.pycuda_device"]
        patch.setattr("deploy.engine.cuda.cuda_python.cudart", self.runtime)
        for module in ("engine.flavour", "runtime.backends.tensorrt"):
            patch.setattr(f"deploy.{module}.has_gpu", lambda: True)
        for module in ("driver", "cuda_python"):
            patch.setattr(f"deploy.engine.cuda.{module}.driver_version", lambda: "580.95.05")
        if library is not None:
            patch.setattr(cuda, "LIBRARIES", {library: cuda.LIBRARIES[library]})

    def array(self, array: np.ndarray, **options: Any) -> Foreign:
        return Foreign(self, array, **options)

    @contextmanager
    def breaks(self, rule: str) -> Iterator[None]:
        """The statements break a rule, which the simulator says in words that hold `rule`."""
        machine = self.machine
        before = len(machine.violations)
        with suppress(RuleError):
            yield
        self.settle()
        self.drain()
        found = machine.violations[before:]
        del machine.violations[before:]
        assert any(rule in str(error) for error in found), f"not found: {rule}; {found}"

    def settle(self) -> None:
        """Let what was dropped be freed."""
        with self.machine.lock:
            self.machine.settle()

    def drain(self) -> None:
        """Let all work be done, and the host know it."""
        machine = self.machine
        for stream in machine.everything():
            if stream.last is not None and machine.sticky is None:
                stream.last.finish()
            join(machine.host, stream.clock)

    def held(self) -> list[str]:
        """What the program has not given back: memory, streams, events and graphs; torch's streams are torch's."""
        self.settle()
        if not (held := self._held()):
            return held
        gc.collect()  # which takes long: only where something is left that may be garbage
        self.settle()
        return self._held()

    def _held(self) -> list[str]:
        machine = self.machine
        pools = [stream.inner for pool in self.torch.pools() for stream in pool]
        return [
            *(owner.label for owner in machine.space.live()),
            *(stream.name for stream in machine.streams.values() if stream not in pools),
            *(f"event {handle:#x}" for handle in machine.events),
            *(f"graph {handle:#x}" for handle in machine.graphs),
            *self.pycuda.leaked,
        ]

    def finish(self) -> None:
        """The end of a test: no rule was broken, whoever caught the error, and no capture is left."""
        self.settle()
        self.drain()
        machine = self.machine
        assert not machine.captures, "a capture was never ended"
        assert not machine.violations, "\n".join(map(str, machine.violations))


class Foreign:
    """An array of another library on the GPU, as CuPy would hand it over. stream: which it says its content is made on."""

    def __init__(
        self,
        simulated: Simulated,
        array: np.ndarray,
        stream: int | None = None,
        offset: int = 0,
        strides: Any = None,
        index: int = 0,
    ) -> None:
        self._front = simulated.runtime
        (before,) = self._front.cudaGetDevice()[1:]
        self._front.cudaSetDevice(index)
        _, self.pointer = self._front.cudaMalloc(max(array.nbytes + offset, 1))
        self._front.cudaSetDevice(before)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        simulated.machine.space.bytes(self.pointer + offset, array.nbytes)[:] = content
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.__cuda_array_interface__ = {
            "data": (self.pointer + offset, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "stream": stream,
            "version": 3,
        }

    def __del__(self) -> None:
        front, pointer = self._front, self.pointer
        front.machine.dropped.append(lambda: front.allocator.free(pointer))
