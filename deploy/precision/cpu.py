"""ONNX graphs in memory, run on the CPU with ONNX Runtime: what ranges and parity are measured with."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from deploy import onnxfile
from deploy.errors import BackendError, PrecisionError
from deploy.onnxfile import save_model
from deploy.precision.graph import first_line, unknown_nodes

try:
    import onnxruntime
except ImportError as error:
    raise BackendError(
        "half precision is checked with ONNX Runtime, which is not installed: install deploy[cpu] or deploy[gpu]"
    ) from error

ONNXRUNTIME_VERSION: str = onnxruntime.__version__

_ERRORS_ONLY = 3


class CpuGraph:
    """An ONNX graph loaded by ONNX Runtime, to be called with a feed. Raises PrecisionError when it cannot be loaded."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Idle threads that spin would slow down the other session of a comparison.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            graph: bytes | str
            if weight_bytes(model) > onnxfile.EXTERNAL_DATA_BYTES:
                graph = str(Path(folder, "model.onnx"))
                save_model(ir.from_proto(model), Path(graph))
            else:
                graph = model.SerializeToString()
            unknown = unknown_nodes(model)
            del model  # ONNX Runtime makes copies of its own: this may be the last reference to one of ours
            try:
                self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's errors have no common base
                for node in unknown:
                    if f"{node.domain}:{node.op_type}(" in str(error):
                        raise PrecisionError(
                            f"ONNX Runtime, which ranges and parity are measured with, does not know node {node.name!r}: it is"
                            f" operator {node.op_type} of domain {node.domain}; replace it by operators of ONNX"
                        ) from error
                raise PrecisionError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. Raises PrecisionError when a node fails."""
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(feed)), strict=True))
        except Exception as error:  # as above
            raise PrecisionError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the initializers that are held in raw form, as all large ones are."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
