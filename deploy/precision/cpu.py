"""ONNX graphs in memory, run on the CPU with ONNX Runtime: what ranges and parity are measured with."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto

from deploy.artifact.tensors import Feed
from deploy.errors import BackendError, PrecisionError
from deploy.host.cpu import usable_cores
from deploy.precision.graph import first_line, unknown_nodes

try:
    import onnxruntime
    from onnxruntime import OrtValue
except ImportError as error:
    raise BackendError(
        "half precision is checked with ONNX Runtime, which is not installed: install deploy[cpu] or deploy[gpu]"
    ) from error

ONNXRUNTIME_VERSION: str = onnxruntime.__version__

_ERRORS_ONLY = 3

STREAMS = 2
"""Calls of a graph at a time where there are many: one counts or copies while the other computes, and half as many threads
wait for each other in each."""

_SHARED_BYTES = 1024
"""Initializers of this size or more are handed to ONNX Runtime as arrays; shapes are computed from smaller ones."""

_STORED = {
    TensorProto.FLOAT: "<f4",
    TensorProto.DOUBLE: "<f8",
    TensorProto.FLOAT16: "<u2",
    TensorProto.BFLOAT16: "<u2",
    TensorProto.INT8: "i1",
    TensorProto.UINT8: "u1",
    TensorProto.INT32: "<i4",
    TensorProto.INT64: "<i8",
}
"""How the elements of an initializer lie in memory: a dtype of the same size."""


class CpuGraph:
    """An ONNX graph loaded by ONNX Runtime, to be called with a feed. Raises PrecisionError when it cannot be loaded.

    also: inner tensors that are to be outputs too. streams: how many threads will call it at a time: they share the cores.
    The model stays as it is.
    """

    def __init__(self, model: onnx.ModelProto, *, also: Sequence[str] = (), streams: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = max(1, usable_cores() // streams)
        # Idle threads that spin would slow down the other session of a comparison.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        unknown = unknown_nodes(model)
        graph, self._weights = _split(model)
        del model  # ONNX Runtime makes copies of its own: this may be the last reference to one of ours
        graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in also)
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        try:
            self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base
            for node in unknown:
                if f"{node.domain}:{node.op_type}(" in str(error):
                    raise PrecisionError(
                        f"ONNX Runtime, which ranges and parity are measured with, does not know node {node.name!r}: it is"
                        f" operator {node.op_type} of domain {node.domain}; replace it by operators of ONNX"
                    ) from error
            raise PrecisionError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, feed: Mapping[str, np.ndarray]) -> Feed:
        """All outputs by name. Raises PrecisionError when a node fails."""
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(feed)), strict=True))
        except Exception as error:  # as above
            raise PrecisionError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error


def _split(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, OrtValue]]:
    """A copy of the model without its large weights, and the weights, which ONNX Runtime reads where they are.

    So no file of over 2 GB, which protobuf cannot hold, comes to be, and none of less is written and parsed.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    weights: dict[str, OrtValue] = {}
    for tensor in graph.graph.initializer:
        stored = _STORED.get(tensor.data_type)
        if stored is None or len(tensor.raw_data) < _SHARED_BYTES:
            continue
        array = np.frombuffer(tensor.raw_data, dtype=stored).reshape(tensor.dims)
        weights[tensor.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "in memory"), ("offset", "0"), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
    return graph, weights
