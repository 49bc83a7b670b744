"""ONNX Runtime on the CPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.artifact import Artifact
from deploy.errors import BackendError
from deploy.machine import usable_cores
from deploy.runtime.session import Session, SessionOptions, closed_error, first_line

try:
    import onnxruntime
except ImportError as error:
    raise BackendError(f"onnxruntime cannot be imported ({error}); install it with: pip install 'deploy[cpu]'") from error

SPIN_US = 100
"""How long an idle worker thread spins before it sleeps, in microseconds.

ONNX Runtime's own default is some tens of milliseconds, in which it slows down whatever runs next in the process. Not
to spin at all costs small models half as much again, for waking a thread takes longer than one of their operators. A
tenth of a millisecond bridges the gaps between operators and between runs back to back, and no more. Versions of ONNX
Runtime that do not know the setting keep their default.
"""


class OnnxRuntimeSession(Session):
    backend = "onnxruntime"

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # errors come as exceptions; warnings are about the optimizer's own doings
        # Left to itself it takes all cores of the machine and ties its threads to them, in every process to the same.
        settings.intra_op_num_threads = options.threads or usable_cores()
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(artifact.onnx_path), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no base class
            hint = ""
            if artifact.manifest.precision == "bf16":
                hint = "; its CPU kernels do not compute in bfloat16: use the openvino backend, or an fp16 or fp32 artifact"
            raise BackendError(f"onnxruntime cannot open {artifact.location}: {_reason(error)}{hint}") from error

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        session = self._session
        if session is None:
            raise closed_error(self.name)
        try:
            # It takes no mapping but a dict.
            return session.run(self._output_names, feed if type(feed) is dict else dict(feed))  # type: ignore[no-any-return]
        except Exception as error:
            raise BackendError(f"onnxruntime failed to run {self.name!r}: {_reason(error)}") from error

    def _release(self) -> None:
        self._session = None


def _reason(error: Exception) -> str:
    """What the error says, less its number and code."""
    line = first_line(error)
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return OnnxRuntimeSession(artifact, options)
