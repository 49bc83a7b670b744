"""A GPU and an engine whose calls cost nothing, so that what is left of `session.run` on CUDA tensors is our own code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from deploy.artifact.artifact import Artifact
from deploy.engine.cuda import Device, Event, Gpu, Graph, Memory, Stream
from deploy.engine.flavour import Flavour
from deploy.runtime.backends.tensorrt_rtx import TensorRTRTXSession
from deploy.runtime.session import Session, SessionOptions

_HERE = nullcontext()
_BACKEND = "deploy.runtime.backends.tensorrt"


class NullStream(Stream):
    handle = 1 << 20

    def synchronize(self) -> None: ...


class NullEvent(Event):
    def record(self, stream: Stream) -> None: ...

    def hold(self, stream: Stream) -> None: ...

    def since(self, earlier: Event) -> float:
        return 0.0


class NullMemory(Memory):
    pointer = 1 << 20
    nbytes = 1 << 30

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None: ...

    def read(self, host: np.ndarray, stream: Stream) -> None: ...


class NullGraph(Graph):
    def launch(self, stream: Stream) -> None: ...


class NullDevice(Device):
    library = "null"
    index = 0
    count = 1
    _stream = NullStream()

    def gpu(self) -> Gpu:
        return Gpu(name="null", compute_capability="8.9", driver=None)

    def active(self) -> nullcontext[None]:
        return _HERE

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        return NullMemory()

    def trim(self) -> None: ...

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None: ...

    def owner(self, pointer: int) -> int | None:
        return 0

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def stream(self) -> Stream:
        return self._stream

    def external(self, handle: int) -> Stream:
        return self._stream

    def event(self, *, timed: bool = False) -> Event:
        return NullEvent()

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        return NullGraph()


class NullTensor(torch.Tensor):
    """A tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __module__ = "torch"
    here = torch.device("cuda", 0)
    is_cuda = True  # type: ignore[assignment]
    device = here  # type: ignore[assignment]
    address = 1 << 20

    def record_stream(self, stream: object) -> None: ...

    def data_ptr(self) -> int:
        return self.address


def _engine(artifact: Artifact) -> Any:
    """An ICudaEngine of the artifact's inputs and outputs."""
    manifest = artifact.manifest
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    names = {"float32": "FLOAT", "float16": "HALF"}
    rows = [1]

    def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
        rows[0] = shape[0]
        return True

    context = SimpleNamespace(
        set_optimization_profile_async=lambda index, stream: True,
        set_input_shape=set_input_shape,
        get_tensor_shape=lambda name: specs[name].concrete({"batch": rows[0]}),
        set_tensor_address=lambda name, address: True,
        execute_async_v3=lambda stream: True,
    )
    return SimpleNamespace(
        num_io_tensors=len(specs),
        get_tensor_name=list(specs).__getitem__,
        get_tensor_mode=lambda name: "in" if specs[name] in manifest.inputs else "out",
        get_tensor_dtype=lambda name: SimpleNamespace(name=names[specs[name].dtype]),
        get_tensor_location=lambda name: "device",
        create_execution_context=lambda: context,
        device_memory_size_v2=0,
    )


def _runtime(artifact: Artifact) -> Any:
    class Logger:
        ERROR = WARNING = 0

        def __init__(self) -> None: ...

    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: _engine(artifact), engine_host_code_allowed=False)
    return SimpleNamespace(
        ILogger=Logger,
        Runtime=lambda log: runtime,
        TensorIOMode=SimpleNamespace(INPUT="in"),
        TensorLocation=SimpleNamespace(DEVICE="device"),
    )


@contextmanager
def null_session(artifact: Artifact, variant: tuple[str, ...] = ()) -> Iterator[tuple[Session, dict[str, torch.Tensor]]]:
    """A session on an engine artifact of one output, with nothing below it, and a feed of batch 1."""
    flavour = Flavour(name="tensorrt", version="null", trt=_runtime(artifact))
    output = torch.empty(artifact.manifest.outputs[0].concrete({"batch": 1})).as_subclass(NullTensor)
    with ExitStack() as stack:
        for name, value in (
            ("load_flavour", lambda name: flavour),
            ("open_device", lambda index: NullDevice()),
            ("has_gpu", lambda: True),
            ("engine_plan", lambda *args, **kwargs: b""),
        ):
            stack.enter_context(patch(f"{_BACKEND}.{name}", value))
        session = stack.enter_context(TensorRTRTXSession(artifact, SessionOptions(variant=variant)))
        calls = session._make_torch_calls()
        stream = SimpleNamespace(cuda_stream=1 << 20)
        calls._torch = SimpleNamespace(  # type: ignore[assignment]
            cuda=SimpleNamespace(current_stream=lambda device: stream, OutOfMemoryError=MemoryError),
            empty=lambda shape, dtype, device: output,
        )
        feed = {spec.name: torch.empty(spec.concrete({"batch": 1})).as_subclass(NullTensor) for spec in artifact.manifest.inputs}
        yield session, feed  # type: ignore[misc]
