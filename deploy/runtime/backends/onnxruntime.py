"""ONNX Runtime: on the CPU, and as `onnxruntime:cuda` and `onnxruntime:tensorrt` with its execution providers for GPUs.

A GPU session runs on the GPU or not at all. It is an error if a provider is missing or did not load, or if a node would run on
the CPU, except for nodes that compute shapes: ONNX Runtime puts those on the CPU on purpose. The setting
`session.disable_cpu_ep_fallback` would refuse them too, so the session checks where each node went instead.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import QUANTIZED, Manifest
from deploy.artifact.tensors import Profile, TensorSpec
from deploy.errors import BackendError, UsageError
from deploy.host.cpu import CRASHES_ON_HALF, DROPS_RELU, QUANTIZES_WEIGHTS, open_in_32_bits, usable_cores
from deploy.runtime.catalog import onnx_file
from deploy.runtime.nvinfer import nvinfer_missing
from deploy.runtime.profiling import RUNS, WARMUPS, LayerTime
from deploy.runtime.runner import closed_error
from deploy.runtime.session import Session, SessionOptions, first_line

SPIN_US = 100
"""How long an idle worker thread spins before it sleeps, in microseconds.

ONNX Runtime's default is some tens of milliseconds, which slows down the code that runs next in the process. Without any
spinning, small models take half as long again, because waking a thread takes longer than one of their operators. A tenth of a
millisecond bridges the gaps between operators and between consecutive runs, and no more. Versions of ONNX Runtime that do not
know the setting keep their default.
"""

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""The execution providers of the variants that run on a GPU."""

SHAPE_OPERATORS = {
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that compute shapes. ONNX Runtime leaves such nodes on the CPU, where the shapes are needed."""

logger = logging.getLogger(__name__)

_CPU = "CPUExecutionProvider"

_TENSORRT_PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"

_KERNEL_TIME = "_kernel_time"
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


class OnnxRuntimeSession(Session):
    backend = "onnxruntime"

    def __init__(self, artifact: Artifact, options: SessionOptions, *, device: str = "cpu") -> None:
        super().__init__(artifact, options, device=device)
        self._artifact = artifact
        self._options = options
        self.onnx_file = onnx_file(self._standing, self.backend, options.variant)
        self._session: Any = self._open(onnxruntime.SessionOptions())

    def _open(self, settings: Any) -> Any:
        """Open an InferenceSession. settings: SessionOptions of ONNX Runtime, which are completed here."""
        artifact, options = self._artifact, self._options
        settings.log_severity_level = 4  # errors are raised as exceptions; warnings only concern the optimizer
        # By default it takes all cores of the machine and pins its threads to them, in every process to the same.
        settings.intra_op_num_threads = options.threads or usable_cores()
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        providers = self._providers(artifact, options, settings)
        try:
            # Without enable_fallback=0, the CPU replaces a provider that fails, with only a line on standard output.
            return open_in_32_bits(
                settings,
                lambda: onnxruntime.InferenceSession(
                    str(self.onnx_file),
                    settings,
                    providers=providers,
                    enable_fallback=0,
                    disabled_optimizers=self._disabled(),
                ),
            )
        except Exception as error:  # ONNX Runtime's errors share no base class
            hint = ""
            if artifact.manifest.precision == "bf16" and self.device == "cpu":
                hint = "; its CPU kernels do not compute in bfloat16: use the openvino backend, or an fp16 or fp32 artifact"
            raise BackendError(f"{_label(options)} cannot open {artifact.location}: {_reason(error)}{hint}") from error

    def _disabled(self) -> list[str]:
        """The optimizers that must not see the file."""
        if self.onnx_file == self._standing.cpu_path:
            return [QUANTIZES_WEIGHTS]
        manifest = self._artifact.manifest
        return [CRASHES_ON_HALF] * _may_hold_half(manifest) + [DROPS_RELU] * (manifest.precision == "fp8")

    def _providers(self, artifact: Artifact, options: SessionOptions, settings: Any) -> list[Any]:
        """The execution providers, the preferred one first. settings: SessionOptions of ONNX Runtime."""
        return [_CPU]

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        # It accepts no mapping but a dict.
        return self._guard(lambda session: session.run(self._output_names, feed if type(feed) is dict else dict(feed)))

    def _guard(self, work: Any) -> Sequence[Any]:
        """The result of `work` on the session, with its errors as BackendError."""
        session = self._session
        if session is None:
            raise closed_error(self.name)
        try:
            return work(session)  # type: ignore[no-any-return]
        except Exception as error:
            raise BackendError(f"onnxruntime failed to run {self.name!r}: {_reason(error)}") from error

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The time of each kernel by its profiler, in a separate session. Layers have the names of the optimized graph."""
        if self.device != "cpu":
            raise BackendError(f"{_label(self._options)} reports when kernels were launched, not how long they took")
        with tempfile.TemporaryDirectory(prefix="deploy-profile-") as folder:
            settings = onnxruntime.SessionOptions()
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "run")
            session = self._open(settings)
            with self._working():
                for _ in range(WARMUPS + runs):
                    self._guard(lambda _: session.run(self._output_names, dict(feed)))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[str, list[float]] = {}
        operators: dict[str, str] = {}
        for event in events:
            name = str(event["name"])
            if event.get("cat") == "Node" and name.endswith(_KERNEL_TIME):
                name = name.removesuffix(_KERNEL_TIME)
                times.setdefault(name, []).append(event["dur"] / 1e3)
                operators[name] = event["args"]["op_name"]
        return [
            LayerTime(name=name, operator=operators[name], ms=statistics.median(runs_ms[WARMUPS:] or runs_ms))
            for name, runs_ms in times.items()
        ]

    def _revive(self) -> None:
        super()._revive()
        self._standing.verify(weights=False)
        self._session = self._open(onnxruntime.SessionOptions())

    def _release(self) -> None:
        self._session = None


class GpuSession(OnnxRuntimeSession):
    """A session on a GPU. nodes: the number of nodes that each execution provider took.

    CUDA tensors go in and out without a copy. ONNX Runtime computes on its own streams, one for each run under way (a stream of
    the caller could be set only once, for all threads). A run therefore waits until the caller's stream is done, and returns
    when its own is, so that the outputs are complete for any stream. numpy arrays and other tensors are copied.
    """

    devices = ("cuda",)

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options, device=f"cuda:{options.device.partition(':')[2] or 0}")
        variant, loaded = _gpu_variant(options), self._session.get_providers()
        if PROVIDERS[variant] not in loaded:
            raise BackendError(
                f"{_label(options)}: {PROVIDERS[variant]} did not load{self._loading}; it needs an NVIDIA driver, and the CUDA and"
                f" cuDNN{' and TensorRT' if variant == 'tensorrt' else ''} libraries that onnxruntime"
                f" {onnxruntime.__version__} was built for: see `deploy doctor`"
            )
        refuse_cpu_nodes(self._session, f"{_label(options)} cannot run {artifact.location}")
        self.nodes = count_nodes(self._session)
        if taken := self.nodes.get(PROVIDERS["cuda"], 0) if variant == "tensorrt" else 0:
            logger.warning("TensorRT left %d of %d nodes of %s to CUDA", taken, sum(self.nodes.values()), artifact.location)

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        super()._check_request(artifact, options)
        variant = _gpu_variant(options)
        self._loading = _load_libraries(variant)
        if reason := provider_missing(variant):
            raise BackendError(reason)

    def _providers(self, artifact: Artifact, options: SessionOptions, settings: Any) -> list[Any]:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        tf32 = "tf32" in options.variant
        index = self.device.partition(":")[2]
        cuda = (PROVIDERS["cuda"], {"device_id": index, "use_tf32": str(int(tf32))})
        if _gpu_variant(options) == "cuda":
            return [cuda]
        if not tf32 and os.environ.get(_TF32_OVERRIDE) != "0":
            raise UsageError(
                "ONNX Runtime's TensorRT provider computes FP32 in TF32, and has no setting for it: set"
                f" {_TF32_OVERRIDE}=0 in the environment, or allow it with onnxruntime:tensorrt,tf32"
            )
        tensorrt = {"device_id": index, "trt_engine_cache_enable": "0", **profile_shapes(artifact.manifest.profiles)}
        if artifact.manifest.precision != "fp32":  # its networks are weakly typed: without this, the precision is refused
            tensorrt[f"trt_{artifact.manifest.precision}_enable"] = "1"
        return [(PROVIDERS["tensorrt"], tensorrt), cuda]

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        torch = sys.modules["torch"]
        here = torch.device(self.device)
        if any(x.device != here or not x.numel() for x in feed.values()):
            return super()._run_torch(feed)
        tensors = {name: x.detach().contiguous() for name, x in feed.items()}
        return self._guard(lambda session: run_bound(session, tensors, self.inputs, self.outputs, self.device))


def run_bound(
    session: Any, feed: Mapping[str, Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], device: str
) -> list[Any]:
    """Run an InferenceSession on contiguous torch tensors on `device` (`cpu`, `cuda:N`), without a copy.

    Outputs are new torch tensors that ONNX Runtime writes to. An output whose shape does not follow from the inputs' is copied
    from ONNX Runtime's memory, which it may reuse as soon as it is free.
    """
    torch = sys.modules["torch"]
    kind, _, number = device.partition(":")
    index = int(number or 0)
    dims = {dim: size for spec in inputs for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)}
    binding = session.io_binding()
    for spec in inputs:
        x = feed[spec.name]
        binding.bind_input(spec.name, kind, index, np.dtype(spec.dtype), tuple(x.shape), x.data_ptr())
    results: list[Any] = []
    for spec in outputs:
        if all(dim in dims for dim in spec.dynamic):
            shape = tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            y = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
            binding.bind_output(spec.name, kind, index, np.dtype(spec.dtype), shape, y.data_ptr())
            results.append(y)
        else:
            binding.bind_output(spec.name, kind, index)
            results.append(None)
    if kind == "cuda":
        torch.cuda.current_stream(device).synchronize()
    session.run_with_iobinding(binding)  # which waits for its own stream
    unknown = [position for position, result in enumerate(results) if result is None]
    values: Any = binding.get_outputs_as_ortvaluevector()
    for position in unknown:
        shared = torch.from_dlpack(values.dlpack_at(position))
        results[position] = shared.to(getattr(torch, outputs[position].dtype), copy=True)
    if unknown and kind == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return results


def profile_shapes(profiles: Sequence[Profile]) -> dict[str, str]:
    """The provider options of TensorRT for one profile that covers `profiles`; none without any.

    Without them, it builds its engine anew at each run whose shapes are outside all that it has seen. The optimum is the largest.
    """
    ends: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for name in profiles[0] if profiles else ():
        ranges = [profile[name] for profile in profiles]
        for end, choose in (("min", min), ("opt", max), ("max", max)):
            sizes = [choose(each) for each in zip(*(getattr(shapes, end) for shapes in ranges), strict=True)]
            ends[end].append(f"{name}:{'x'.join(map(str, sizes))}")
    return {f"trt_profile_{end}_shapes": ",".join(shapes) for end, shapes in ends.items() if shapes}


def provider_missing(variant: str) -> str | None:
    """Why the installed ONNX Runtime has no execution provider for a variant of `PROVIDERS`, or not what it needs; else None."""
    name = PROVIDERS[variant]
    if name in onnxruntime.get_available_providers():
        reason = nvinfer_missing(_TENSORRT_PROVIDER) if variant == "tensorrt" else None
        return f"onnxruntime:{variant} {reason}" if reason else None
    return (
        f"onnxruntime:{variant} needs {name}, which the installed onnxruntime {onnxruntime.__version__} lacks: install"
        " onnxruntime-gpu in its place (pip uninstall onnxruntime, then pip install 'deploy[gpu]')"
    )


def _load_libraries(variant: str) -> str:
    """Load the CUDA libraries of pip packages, which the dynamic linker does not find; the printed complaint, in brackets."""
    if variant == "tensorrt":
        with contextlib.suppress(ImportError):  # it may be installed for the whole system
            importlib.import_module("tensorrt")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # standard output is for results
        onnxruntime.preload_dlls()
    lines = printed.getvalue().split("\n")
    return f" ({lines[0]})" if lines[0] else ""


def _assigned(session: Any) -> Iterable[tuple[str, str]]:
    """The execution provider and the operator of each node."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} does not say where its nodes run: a GPU session needs a newer onnxruntime-gpu"
        )
    return ((part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes())


def count_nodes(session: Any) -> dict[str, int]:
    """The number of nodes that each execution provider took."""
    return dict(Counter(provider for provider, _ in _assigned(session)))


def refuse_cpu_nodes(session: Any, what: str) -> None:
    """Raise BackendError if a node is on the CPU that does not compute shapes. what: the beginning of the message."""
    if refused := sorted({operator for provider, operator in _assigned(session) if provider == _CPU} - SHAPE_OPERATORS):
        raise BackendError(f"{what}: the provider has no kernel for {', '.join(refused)}, which would run on the CPU")


def _gpu_variant(options: SessionOptions) -> str:
    return next(name for name in options.variant if name in PROVIDERS)


def _label(options: SessionOptions) -> str:
    return f"onnxruntime:{','.join(options.variant)}" if options.variant else "onnxruntime"


def _reason(error: Exception) -> str:
    """The message of an error, without its number and code."""
    line = first_line(error)
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line


def _may_hold_half(manifest: Manifest) -> bool:
    """Whether a part of the file may compute in half precision; unknown of a quantized file that was made elsewhere."""
    if manifest.precision in QUANTIZED:
        return manifest.calibration is None or manifest.calibration.floats != "fp32"
    return manifest.precision in ("fp16", "bf16")


def version(variant: Sequence[str]) -> str:
    """The version of ONNX Runtime. Raises BackendError if it was built without the execution provider of the variant."""
    for name in variant:
        if name in PROVIDERS and (reason := provider_missing(name)):
            raise BackendError(reason)
    return str(onnxruntime.__version__)


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    if any(name in PROVIDERS for name in options.variant):
        return GpuSession(artifact, options)
    if options.variant:
        raise UsageError(f"onnxruntime:{','.join(options.variant)} means nothing on the CPU; name cuda or tensorrt with it")
    return OnnxRuntimeSession(artifact, options)
