"""ONNX graphs in memory that run on the CPU with ONNX Runtime, to measure activation ranges and parity."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.errors import PrecisionError
from deploy.host.cpu import CRASHES_ON_HALF, DROPS_RELU, QUANTIZES_WEIGHTS, open_in_32_bits, usable_cores
from deploy.host.extras import missing
from deploy.precision.graph import first_line, unknown_nodes

try:
    import onnxruntime
    from onnxruntime import OrtValue
except ImportError as error:
    raise missing(error, "a check against the FP32 graph") or error from error

ONNXRUNTIME_VERSION: str = onnxruntime.__version__

_FATAL_ONLY = 4  # an error is raised as well

STREAMS = 2
"""Number of concurrent calls of a graph where there are many calls: one counts or copies while the other computes, and with
half as many threads each, fewer wait for one another."""

_SHARED_BYTES = 1024
"""Initializers of at least this size are passed to ONNX Runtime as arrays; shapes are computed from smaller ones."""

_STORED = {
    ir.DataType.FLOAT: "<f4",
    ir.DataType.DOUBLE: "<f8",
    ir.DataType.FLOAT16: "<u2",
    ir.DataType.BFLOAT16: "<u2",
    ir.DataType.FLOAT8E4M3FN: "u1",
    ir.DataType.INT8: "i1",
    ir.DataType.UINT8: "u1",
    ir.DataType.INT32: "<i4",
    ir.DataType.INT64: "<i8",
}
"""A numpy dtype with the same memory layout as the elements of an initializer."""

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_LOCATION = "in memory"


class CpuGraph:
    """An ONNX graph loaded by ONNX Runtime, to be called with a feed. Raises PrecisionError when it cannot be loaded.

    also: inner tensors to return in addition to the outputs. streams: how many threads will call it concurrently; they
    share the cores. The model is not changed.
    """

    def __init__(self, model: ir.Model, *, also: Sequence[str] = (), streams: int = 1) -> None:
        options = _session_options(streams)
        proto, self._weights = _serialize(model)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in also)
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        disabled = [CRASHES_ON_HALF, DROPS_RELU] if _holds_half(model) else [DROPS_RELU]
        self._session = _open(proto.SerializeToString(), options, lambda: model, disabled)
        self._outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def read(cls, path: Path, *, cpu_form: bool = False) -> "CpuGraph":
        """The graph of an ONNX file as it is written, which may compute in half precision.

        cpu_form: of an INT8 graph.
        """
        graph = cls.__new__(cls)
        graph._weights = {}
        options = _session_options(1)
        disabled = [QUANTIZES_WEIGHTS] if cpu_form else [CRASHES_ON_HALF, DROPS_RELU]
        graph._session = _open(str(path), options, lambda: ir.load(path), disabled)
        graph._outputs = [output.name for output in graph._session.get_outputs()]
        return graph

    def __call__(self, feed: Mapping[str, np.ndarray]) -> Feed:
        """All outputs by name. Raises PrecisionError when a node fails."""
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(feed)), strict=True))
        except Exception as error:  # ONNX Runtime has no base class of errors
            raise PrecisionError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error


def _session_options(streams: int) -> "onnxruntime.SessionOptions":
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # An output is a view of what the session allocated: one small output that is kept would keep the whole arena.
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = max(1, usable_cores() // streams)
    # In the order of the graph: by default, what measures a tensor runs when all the others are there (three times the memory).
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # Idle threads that spin would slow down the other session of a comparison.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _holds_half(model: ir.Model) -> bool:
    """Whether a part of a graph may compute in half precision."""
    values = (value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values()))
    casts = (node.attributes.get_int("to", 0) for node in model.graph.all_nodes() if node.op_type == "Cast")
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    return any(value.dtype in _HALVES for value in (*values, *made)) or any(to in _HALVES for to in casts)


def _open(source: bytes | str, options: Any, model: Callable[[], ir.Model], disabled: Sequence[str]) -> Any:
    """A session on serialized bytes or a file; `model` is looked into for what an error is about."""
    try:
        providers = ["CPUExecutionProvider"]
        return open_in_32_bits(
            options, lambda: onnxruntime.InferenceSession(source, options, providers=providers, disabled_optimizers=disabled)
        )
    except Exception as error:  # ONNX Runtime's errors have no common base
        for node in unknown_nodes(model()):
            if f"{node.domain}:{node.op_type}(" in str(error):
                raise PrecisionError(
                    f"ONNX Runtime, which ranges and parity are measured with, does not know node {node.name!r}: it is"
                    f" operator {node.op_type} of domain {node.domain}; replace it by operators of ONNX"
                ) from error
        raise PrecisionError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error


def _serialize(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, OrtValue]]:
    """The model without its large weights, and these weights, which ONNX Runtime reads where they are.

    So there is never a message of more than 2 GB, which protobuf cannot hold, and no weight is copied.
    """
    slim = model.clone()
    weights: dict[str, OrtValue] = {}
    for name, value in list(slim.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        if not value.uses() and not value.is_graph_output():  # ONNX Runtime refuses a weight that nothing reads
            del slim.graph.initializers[name]
            continue
        stored = _STORED.get(tensor.dtype)
        if stored is None or tensor.nbytes < _SHARED_BYTES:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy(), name=name)
            continue
        array = np.require(tensor.numpy(), requirements=["C", "A"]).view(stored)
        weights[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
        value.const_value = ir.ExternalTensor(_LOCATION, 0, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name)
    return ir.to_proto(slim), weights
