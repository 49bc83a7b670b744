"""OpenVINO on the CPU.

By default it computes in bfloat16 if the CPU can, and logits are off by some hundredths. Here FP32 means FP32, unless
`SessionOptions.compute` asks for less.
"""

import logging
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.host.cpu import adds_in_16_bits, is_x86, usable_cores
from deploy.runtime.lifetime import keep_for_ever
from deploy.runtime.profiling import RUNS, WARMUPS, LayerTime
from deploy.runtime.runner import closed_error
from deploy.runtime.session import Session, SessionOptions

_TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hides OpenVINO's telemetry package while OpenVINO is imported; it then uses a stub.

    The telemetry reports to a web service, which a runtime must not do unasked. It also forks the process from a background
    thread: the copy may deadlock, and then keeps every pipe of its parent open.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: importing it fails
    hidden = _TELEMETRY not in modules
    if hidden:
        modules[_TELEMETRY] = None
    try:
        yield
    finally:
        if hidden:
            del modules[_TELEMETRY]


with _without_telemetry():
    import openvino

    from deploy.runtime.backends.openvino_codes import halve_weights, unsign

_CORE = openvino.Core()
"""The Core of all sessions. It lives as long as the process.

The CPU plugin gives the thread that loads it an alternate signal stack, and frees that stack with the last Core. If another thread
dropped that Core, the next signal would kill the process (seen with OpenVINO 2026.4).
"""

keep_for_ever(_CORE)

logger = logging.getLogger("deploy.runtime")

_HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}


class OpenVinoSession(Session):
    backend = "openvino"
    computes = ("fp32", "bf16", "fp16")

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options)
        hint = _HINTS[options.compute]
        streams = self.concurrency = options.contexts or 1
        config = {
            **({"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": streams}),
            "INFERENCE_PRECISION_HINT": hint,
            # For all streams together.
            "INFERENCE_NUM_THREADS": options.threads * streams if options.threads else max(usable_cores(), streams),
            # Pinning would tie the threads of every process to the same cores: two services would share them.
            "ENABLE_CPU_PINNING": False,
        }
        self._artifact = artifact
        self._config = config
        self._compiled: Any = self._compile(config)
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        if used != hint:
            raise BackendError(f"openvino cannot compute in {options.compute} on this CPU: it would use {used.get_type_name()}")
        self._positions = [self._position(name) for name in self._input_names]
        # Where an output is an input as it came, OpenVINO lets both have one memory and frees it twice (seen with 2026.4): such a
        # model gets copies of the feeds in memory of the request's own.
        self._shares = not _passes_through(self._compiled)
        # A request runs one feed at a time: each run takes an idle one, or makes another.
        self._idle: deque[Any] = deque()

    def _compile(self, config: Mapping[str, Any]) -> Any:
        try:
            model = _CORE.read_model(self.onnx_file)
            if is_x86():
                unsign(model)
            if adds_in_16_bits() and halve_weights(model):
                logger.debug("%r: weights of 7 bits, for this processor has no VNNI", self.name)
            return _CORE.compile_model(model, "CPU", dict(config))
        except RuntimeError as error:
            raise BackendError(f"openvino cannot open {self._artifact.location}: {_reason(error)}") from error

    def _position(self, name: str) -> int:
        return next(i for i, port in enumerate(self._compiled.inputs) if name in port.names)

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        compiled = self._compiled
        if compiled is None:
            raise closed_error(self.name)
        try:
            try:
                request = self._idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            # A tensor does not keep its array alive, so `arrays` does until the run is over. Read-only arrays are not accepted.
            arrays = [x if x.flags.writeable else x.copy() for x in map(feed.__getitem__, self._input_names)]
            for position, x in zip(self._positions, arrays, strict=True):
                if self._shares:
                    request.set_input_tensor(position, openvino.Tensor(x, shared_memory=True))
                else:
                    own = request.get_input_tensor(position)
                    own.shape = x.shape
                    own.data[...] = x
            request.infer()
            # Copies: the next run with this request writes to the same memory.
            results = [request.get_output_tensor(i).data.copy() for i in range(len(self._output_names))]
        except RuntimeError as error:
            raise BackendError(f"openvino failed to run {self.name!r}: {_reason(error)}") from error
        self._idle.append(request)
        if self._closed:
            self._idle.clear()
        return results

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The times by OpenVINO's performance counts, from a separately compiled model."""
        request = self._compile({**self._config, "PERF_COUNT": True}).create_infer_request()
        times: dict[str, list[float]] = {}
        operators: dict[str, str] = {}
        arrays = [np.array(feed[name]) for name in self._input_names]
        with self._working():
            for run in range(WARMUPS + runs):
                request.infer(dict(zip(self._positions, arrays, strict=True)))
                for node in request.get_profiling_info() if run >= WARMUPS else ():
                    if node.status == node.Status.EXECUTED:
                        times.setdefault(node.node_name, []).append(node.real_time.total_seconds() * 1e3)
                        operators[node.node_name] = node.node_type
        return [LayerTime(name=name, operator=operators[name], ms=statistics.median(runs_ms)) for name, runs_ms in times.items()]

    def _revive(self) -> None:
        super()._revive()
        self._standing.verify(weights=False)
        self._idle = deque()
        self._compiled = self._compile(self._config)
        if self._config["INFERENCE_NUM_THREADS"] > self.concurrency:
            logger.warning(
                "%r was loaded with OpenVINO before the process was forked, whose threads cannot be started anew: each run uses one"
                " thread here; load it in the child, or take onnxruntime, which has all of its threads again",
                self.name,
            )

    def _release(self) -> None:
        self._compiled = None
        self._idle.clear()


def _passes_through(compiled: Any) -> bool:
    """Whether an output is an input as it came, after OpenVINO has taken out what does nothing."""
    results = (port.get_node() for port in compiled.get_runtime_model().outputs)
    return any(result.input_value(0).get_node().get_type_name() == "Parameter" for result in results)


def _reason(error: Exception) -> str:
    """The message of an error, without the lines that name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    useful = [
        line for line in lines if line and not line.startswith(("Exception from", "Check '", "FrontEnd API failed", "Summary:"))
    ]
    return " ".join(useful) or " ".join(lines)


def version(variant: Sequence[str]) -> str:
    """The version of OpenVINO, without the number of the build."""
    return str(openvino.__version__).partition("-")[0]


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return OpenVinoSession(artifact, options)
