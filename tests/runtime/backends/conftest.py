"""A fake GPU and a fake TensorRT for it, which say that they are fake: no engine can be loaded without a real GPU.

They are strict where the real ones are silent: work is done only when a stream is waited for, memory that was freed is
poisoned, and reading or writing it is an error, as is an execution context that is used on two streams at once.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Target
from deploy.artifact.tensors import Profile, ShapeRange, TensorSpec
from deploy.artifact.writer import ArtifactWriter
from deploy.engine.cuda import Device, DeviceMemoryError, Event, Gpu, Graph, Memory, Stream
from deploy.engine.flavour import Flavour
from deploy.errors import BackendError

POISON = 0xCB


class FakeStream(Stream):
    def __init__(self, device: "FakeDevice", handle: int | None = None) -> None:
        self.device = device
        device.handles += 1
        self.handle = device.handles + 1000 if handle is None else handle
        device.streams[self.handle] = self
        self.work: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def give(self, work: Callable[[], None]) -> None:
        (self.work if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        self.device.synchronized += 1
        self.drain()

    def drain(self) -> None:
        with self.device.lock:
            while self.work:
                self.work.pop(0)()


class FakeEvent(Event):
    def __init__(self, timed: bool) -> None:
        self.stream: FakeStream | None = None
        self.done = True
        self.timed = timed
        self.at = 0.0

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, FakeStream)
        self.stream, self.done = stream, False

        def reached() -> None:
            self.done = True
            self.at = time.perf_counter()

        stream.give(reached)

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        assert self.timed
        assert earlier.timed
        assert self.done
        assert earlier.done
        return (self.at - earlier.at) * 1e3

    def hold(self, stream: Stream) -> None:
        assert isinstance(stream, FakeStream)

        def wait() -> None:
            while not self.done:
                assert self.stream is not None
                self.stream.work.pop(0)()

        stream.give(wait)


class FakeMemory(Memory):
    def __init__(self, device: "FakeDevice", nbytes: int) -> None:
        self.device = device
        self.nbytes = max(nbytes, 1)
        self.pointer = device.next_pointer
        device.next_pointer += -(-self.nbytes // 256) * 256
        self.content = np.full(self.nbytes, POISON, dtype=np.uint8)
        device.blocks[self.pointer] = self.content
        device.used += self.nbytes

    def __del__(self) -> None:
        self.content[:] = POISON
        self.device.blocks.pop(self.pointer, None)
        self.device.used -= self.nbytes

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        pointer, size = self.pointer + offset, host.size
        stream.give(lambda: self.device.bytes(pointer, size).__setitem__(slice(None), host))  # type: ignore[attr-defined]

    def read(self, host: np.ndarray, stream: Stream) -> None:
        pointer, device = self.pointer, self.device
        stream.give(lambda: host.__setitem__(slice(None), device.bytes(pointer, host.size)))  # type: ignore[attr-defined]


class FakeGraph(Graph):
    def __init__(self, device: "FakeDevice", work: list[Callable[[], None]]) -> None:
        self.device = device
        self.work = work

    def launch(self, stream: Stream) -> None:
        self.device.launches += 1
        for work in self.work:
            stream.give(work)  # type: ignore[attr-defined]


class OnDevice:
    """An array in the memory of the fake, as CuPy would hand it over."""

    def __init__(
        self, gpu: "FakeDevice", array: np.ndarray, stream: int | None = None, offset: int = 0, strides: Any = None
    ) -> None:
        self.memory: Any = gpu.allocate(array.nbytes + offset, gpu.external(1))
        self.memory.content[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = {
            "data": (self.memory.pointer + offset, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "stream": stream,
            "version": 3,
        }


class FakeDevice(Device):
    """Host memory that passes for a GPU's."""

    library = "fake"

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.index = 0
        self.handles = 0
        self.streams: dict[int, FakeStream] = {}
        self.blocks: dict[int, np.ndarray] = {}
        self.next_pointer = 1 << 20
        self.used = 0
        self.total = 1 << 30
        self.launches = self.captures = self.synchronized = 0
        self.capturable = True
        self.count = 1
        self.here = threading.local()
        self.external(1)

    def bytes(self, pointer: int, nbytes: int) -> np.ndarray:
        for start, block in self.blocks.items():
            if start <= pointer and pointer + nbytes <= start + block.size:
                return block[pointer - start : pointer - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are not allocated: they were freed too early, or never")

    @contextmanager
    def active(self) -> Iterator[None]:
        self.here.depth = getattr(self.here, "depth", 0) + 1
        try:
            yield
        finally:
            self.here.depth -= 1

    def check_active(self) -> None:
        assert getattr(self.here, "depth", 0), "this would run on whichever GPU the thread has"

    def gpu(self) -> Gpu:
        return Gpu(name="Fake GPU", compute_capability="8.9", driver="580.95.05")

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        if self.used + nbytes > self.total:
            raise DeviceMemoryError(nbytes, *self.memory())
        return FakeMemory(self, nbytes)

    def array(self, array: np.ndarray, **options: Any) -> OnDevice:
        return OnDevice(self, array, **options)

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.full(max(nbytes, 1), POISON, dtype=np.uint8)

    def stream(self) -> Stream:
        return FakeStream(self)

    def external(self, handle: int) -> Stream:
        if handle not in self.streams:
            self.streams[handle] = FakeStream(self, handle)
        return self.streams[handle]

    def trim(self) -> None: ...

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        stream.give(lambda: self.bytes(target, nbytes).__setitem__(slice(None), self.bytes(source, nbytes)))  # type: ignore[attr-defined]

    def owner(self, pointer: int) -> int | None:
        return 0

    def event(self, *, timed: bool = False) -> Event:
        return FakeEvent(timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        assert isinstance(stream, FakeStream)
        if not self.capturable:
            raise BackendError("the work cannot be captured in a CUDA graph: fake reason")
        self.captures += 1
        stream.captured = []
        try:
            work()
            return FakeGraph(self, stream.captured)
        finally:
            stream.captured = None


class FakeContext:
    """Computes `y = 2 x`, and `count = number of elements above 0` as an output whose shape depends on data."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.device = engine.device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.profile = 0
        self.active: int | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.about["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.about["profiles"][self.profile]
        self.shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "y" else (-1,)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return pointer % 256 == 0

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, handle: int) -> bool:
        self.device.check_active()
        if self.engine.failures:
            self.engine.failures.pop()
            return False
        stream, shape, addresses = self.device.streams[handle], self.shapes["x"], dict(self.addresses)
        assert self.active in (None, handle) or not self.device.streams[self.active].work or self._waits(stream)
        self.active = handle
        self.engine.runs += 1

        def work() -> None:
            nbytes = int(np.prod(shape)) * 4
            x = self.device.bytes(addresses["x"], nbytes).view(np.float32)
            self.device.bytes(addresses["y"], nbytes).view(np.float32)[:] = 2 * x
            if "positive" in self.allocators:
                found = x[x > 0]
                allocator = self.allocators["positive"]
                pointer = allocator.reallocate_output_async("positive", 0, max(found.nbytes, 1), 256, handle)
                assert pointer, "no memory for the output"
                self.device.bytes(pointer, found.nbytes)[:] = found.view(np.uint8)
                allocator.notify_shape("positive", found.shape)

        stream.give(work)
        return True

    def _waits(self, stream: FakeStream) -> bool:
        return any(work.__qualname__.startswith("FakeEvent.hold") for work in stream.work)


class FakeEngine:
    def __init__(self, device: FakeDevice, about: dict[str, Any]) -> None:
        self.device = device
        self.about = about
        self.runs = 0
        self.contexts = 0
        self.failures: list[None] = []
        self.device_memory_size_v2 = 1 << 20
        names = ["x", *about["outputs"]]
        self.num_io_tensors = len(names)
        self.get_tensor_name = names.__getitem__
        self.num_optimization_profiles = len(about["profiles"])

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.about.get("dtypes", {}).get(name, "FLOAT"))

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def create_execution_context(self) -> FakeContext | None:
        self.device.check_active()
        if self.device.used + self.device_memory_size_v2 > self.device.total:
            return None
        self.contexts += 1
        return FakeContext(self)


class FakeTensorRT:
    """Stands for the module `tensorrt`. `engines` are those that were loaded."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")

    class ILogger:
        ERROR, WARNING = 1, 2

        def __init__(self) -> None: ...

    class IOutputAllocator:
        def __init__(self) -> None: ...

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.engines: list[FakeEngine] = []

    def Runtime(self, log: Any) -> Any:
        def deserialize(plan: bytes) -> FakeEngine | None:
            self.device.check_active()
            try:
                about = json.loads(plan)
            except ValueError:
                log.log(1, "the plan is no plan of the fake")
                return None
            self.engines.append(FakeEngine(self.device, about))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture
def gpu() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def trt(gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """The session believes in the fake."""
    fake = FakeTensorRT(gpu)
    flavour = Flavour(name="tensorrt", version="11.4.0", trt=fake)
    monkeypatch.setattr("deploy.runtime.backends.tensorrt.load_flavour", lambda name: flavour)
    monkeypatch.setattr("deploy.runtime.backends.tensorrt.open_device", lambda index: gpu)
    monkeypatch.setattr("deploy.runtime.backends.tensorrt.has_gpu", lambda: True)
    yield fake
    assert all(not stream.work for stream in gpu.streams.values()), "work was left behind"


@pytest.fixture
def make(tmp_path: Path, shared_lenet5: Artifact) -> Callable[..., Artifact]:
    """An engine artifact for the fake: input x (batch, 4) float32; `profiles` are (min, max) batches."""

    def build(
        profiles: tuple[tuple[int, int], ...] = ((1, 8),),
        outputs: tuple[str, ...] = ("y",),
        target: Target | None = None,
        plan: bytes | None = None,
        width: int = 4,
    ) -> Artifact:
        about = {"profiles": [((low, width), (high, width)) for low, high in profiles], "outputs": outputs}
        shapes: list[Profile] = [
            {"x": ShapeRange(min=(low, width), opt=((low + high) // 2, width), max=(high, width))} for low, high in profiles
        ]
        target = target or Target(flavour="tensorrt", version="11.4.0", gpu="Fake GPU", compute_capability="8.9", targets=["8.9"])
        with ArtifactWriter(tmp_path / "engine") as writer:
            (writer.path / ENGINE).write_bytes(json.dumps(about).encode() if plan is None else plan)
            (writer.path / ONNX).write_bytes(b"typed")
            dims = {"y": ("batch", width), "positive": ("found",)}
            specs = [TensorSpec(name=name, dtype="float32", shape=dims[name]) for name in outputs]
            return writer.commit(
                msgspec.structs.replace(
                    shared_lenet5.manifest,
                    kind="engine",
                    name="engine",
                    files={},
                    preprocess=None,
                    classes=None,
                    inputs=[TensorSpec(name="x", dtype="float32", shape=("batch", width))],
                    outputs=specs,
                    profiles=shapes,
                    target=target,
                )
            )

    return build
