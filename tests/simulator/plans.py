"""Engine files of the simulator: an ONNX file with profiles, computed by ONNX Runtime."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""Least, best and largest shape of each input."""

_MAGIC = b"simulated engine\n"


def make_plan(
    model: bytes,
    profiles: Sequence[Ranges],
    *,
    workspace: int = 1 << 12,
    host: Sequence[str] = (),
    host_code: bool = False,
    stripped: bool = False,
    flavour: str = "tensorrt",
) -> bytes:
    """An engine file. model: a serialised ONNX file. workspace: bytes of each context. host: inputs in host memory.

    host_code: it is version-compatible, so that the runtime must allow host code. stripped: it computes once it has been refitted.
    """
    about = {"profiles": profiles, "workspace": workspace, "host": list(host), "host_code": host_code}
    about |= {"stripped": stripped, "flavour": flavour}
    head = json.dumps(about).encode()
    return _MAGIC + len(head).to_bytes(4, "little") + head + model


@dataclass(frozen=True)
class Tensor:
    """An input or output. kind: of `onnx.TensorProto.DataType`; shape: numbers, and names of dynamic dimensions."""

    name: str
    kind: int
    shape: tuple[int | str, ...]
    is_input: bool

    @property
    def itemsize(self) -> int:
        return 2 if self.kind == onnx.TensorProto.BFLOAT16 else int(onnx.helper.tensor_dtype_to_np_dtype(self.kind).itemsize)


class Plan:
    """What is in an engine file. Raises ValueError if it is none of the simulator's."""

    def __init__(self, content: bytes) -> None:
        content = bytes(content)
        if not content.startswith(_MAGIC):
            raise ValueError("the plan is no simulated engine")
        start = len(_MAGIC) + 4
        end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
        about = json.loads(content[start:end])
        self.model = content[end:]
        self.workspace: int = about["workspace"]
        self.host: list[str] = about["host"]
        self.host_code: bool = about["host_code"]
        self.stripped: bool = about["stripped"]
        self.ready = not self.stripped
        self.flavour: str = about["flavour"]
        self.profiles: list[dict[str, list[Shape]]] = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()} for profile in about["profiles"]
        ]
        self.tensors, self.nodes = _read(self.model)

    def refit(self, model: bytes) -> None:
        self.model, self.ready = model, True

    def tensor(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def output_shape(self, tensor: Tensor, shapes: Mapping[str, Shape]) -> Shape:
        """-1 for a dimension that the shapes of the inputs do not tell."""
        known: dict[int | str, int] = {}
        for name, given in shapes.items():
            declared = self.tensor(name)
            assert declared is not None
            known |= dict(zip(declared.shape, given, strict=True))
        return tuple(size if isinstance(size, int) else known.get(size, -1) for size in tensor.shape)

    def compute(self, inputs: Mapping[str, tuple[int, Shape]], outputs: Mapping[str, tuple[int, Shape]]) -> dict[str, np.ndarray]:
        """Run on memory: address and shape by name. Outputs that are not given are returned."""
        session = _session(self.model)
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, (address, shape) in tensors.items():
                found = self.tensor(name)
                assert found is not None
                bind(name, "cpu", 0, found.kind, list(shape), address)
        rest = [tensor.name for tensor in self.tensors if not tensor.is_input and tensor.name not in outputs]
        for name in rest:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        names = [output.name for output in session.get_outputs()]
        bound = [name for name in itertools.chain(outputs, rest) if name in names]
        return {name: value.numpy() for name, value in zip(bound, binding.get_outputs(), strict=True) if name in rest}


@functools.lru_cache(maxsize=32)
def _read(model: bytes) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """The tensors of a model, inputs first, and name and operator of its nodes."""
    graph = onnx.load_from_string(model).graph
    weights = {tensor.name for tensor in graph.initializer}
    tensors = []
    for values, is_input in ((graph.input, True), (graph.output, False)):
        for value in values:
            if value.name in weights:
                continue
            kind: Any = value.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            tensors.append(Tensor(value.name, kind.elem_type, shape, is_input))
    return tensors, [(node.name, node.op_type) for node in graph.node]


@functools.lru_cache(maxsize=32)
def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
