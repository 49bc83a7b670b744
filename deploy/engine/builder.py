"""A typed ONNX file to a TensorRT engine, the same for every flavour.

Networks are always strongly typed: the precision of each tensor is the one in the ONNX file, and no builder flag can
change it. TF32 would change FP32 in silence, so it is off unless asked for.
"""

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifact import Target
from deploy.engine.flavour import RTX_TARGETS, Flavour
from deploy.errors import EngineError, UsageError
from deploy.onnxfile import load_graph
from deploy.progress import Progress, silent
from deploy.tensors import Profile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build an engine.

    opt_level: 0 (quick build) to 5 (slow build, fast engine); None for TensorRT's default, 3.
    tf32: let FP32 convolutions and matrix products round their inputs to TF32 (10 bits of mantissa).
    timing_cache: file of tactic timings to read and write; `tensorrt` only.
    version_compatible: the engine runs on later minor versions too.
    hardware_compatible: the engine runs on any GPU from Ampere on.
    """

    opt_level: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise UsageError(f"--opt-level must be 0 to 5, not {self.opt_level}")


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A serialized engine, the network that it was built from (alive while this is), and what it was built for."""

    plan: bytes
    network: Any
    target: Target


def build_engine(
    flavour: Flavour,
    onnx_path: Path,
    profiles: list[Profile],
    options: BuildOptions,
    progress: Progress = silent,
    *,
    shown: str | None = None,
) -> BuiltEngine:
    """Parse and build `onnx_path` with one optimization profile for each of `profiles`. Errors call it `shown`.

    Raises EngineError for nodes that the parser refuses (each by its ONNX name, with a remedy) and for a failed build,
    UsageError for options that the flavour does not have.
    """
    trt = flavour.trt
    shown = shown or str(onnx_path)
    if flavour.name == "tensorrt-rtx":
        if options.timing_cache is not None:
            raise UsageError("--timing-cache: tensorrt-rtx times nothing while building; leave it out")
        if options.version_compatible or options.hardware_compatible:
            raise UsageError(
                "--version-compatible and --hardware-compatible are for the flavour tensorrt; tensorrt-rtx has neither"
            )
    log = _make_logger(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise EngineError(f"{flavour.name} cannot start: {log.last()}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    progress("parsing", 0, 0)
    if not parser.parse_from_file(str(onnx_path)):
        raise EngineError(_refusals(flavour, builder, parser, onnx_path, log, shown))
    config = builder.create_builder_config()
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    _set_options(config, trt, options)
    for profile in profiles:
        _add_profile(builder, config, profile)
    cache = _read_timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{flavour.name} {flavour.version} could not build {shown}: {log.last()}")
    if cache is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return BuiltEngine(plan=bytes(plan), network=_Kept(network, parser, builder, log), target=_target(flavour))


class _Kept:
    """A network with the objects that must outlive it: TensorRT's Python objects do not hold one another."""

    def __init__(self, network: Any, *owners: Any) -> None:
        self._network = network
        self._owners = owners

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _set_options(config: Any, trt: Any, options: BuildOptions) -> None:
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then tells every layer's precision


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    optimization = builder.create_optimization_profile()
    for name, shapes in profile.items():
        optimization.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(optimization) < 0:
        raise EngineError("TensorRT refused the profile " + ", ".join(f"{name}={shapes}" for name, shapes in profile.items()))


def _read_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _target(flavour: Flavour) -> Target:
    if flavour.builds_without_gpu:
        return Target(flavour=flavour.name, version=flavour.version, gpu=None, compute_capability=None, targets=list(RTX_TARGETS))
    gpu, capability = _current_gpu()
    return Target(flavour=flavour.name, version=flavour.version, gpu=gpu, compute_capability=capability, targets=[capability])


def _current_gpu() -> tuple[str, str]:
    """Name and compute capability of the GPU that TensorRT builds on."""
    from deploy.engine.gpu import current_gpu  # loads CUDA: only on a machine that has it

    return current_gpu()


_REMEDIES: Mapping[str, str] = {
    "Col2Im": "write fold as a transposed convolution, or leave it outside the model",
    "NonZero": "its output shape depends on data: use a mask of fixed shape",
    "StringNormalizer": "strings cannot run on a GPU: do this before the model",
}
_REMEDY = "replace it in the model by operators that TensorRT has, or run this model on ONNX Runtime"
_NO_PLUGIN = "Plugin not found"
"""What the parser says of an operator that it does not know, for it then looks for a plugin of that name."""


def _refusals(flavour: Flavour, builder: Any, parser: Any, onnx_path: Path, log: Any, shown: str) -> str:
    """Every node that the parser refuses, by its ONNX name, with the reason and a remedy, a line each."""
    trt = flavour.trt
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    checker = trt.OnnxParser(network, log)  # parse() stops at the first refusal; this lists them all
    checker.supports_model_v2(onnx_path.read_bytes(), str(onnx_path))
    errors: dict[tuple[str, str], str] = {}
    for source in (parser, checker):
        for index in range(source.num_errors):
            error = source.get_error(index)
            reason = re.sub(r"^Assertion failed: .*?\): ", "", error.desc() or "")
            if reason in ("", "false"):
                reason = "the operator is not supported"
            elif _NO_PLUGIN in reason:
                domain = _domain(onnx_path, error.node_operator(), error.node_name())
                reason = f"operator {error.node_operator()} of domain {domain} is not known to {flavour.name}"
            errors.setdefault((error.node_operator(), error.node_name()), reason)
    if not any(operator for operator, _ in errors):
        return f"{flavour.name} {flavour.version} cannot parse {shown}: {next(iter(errors.values()), log.last())}"
    lines = [
        f"  {operator} {name!r}: {reason}; {_REMEDIES.get(operator, _REMEDY)}" for (operator, name), reason in errors.items()
    ]
    noun = "node" if len(lines) == 1 else "nodes"
    return "\n".join([f"{flavour.name} {flavour.version} refuses {len(lines)} {noun} of {shown}:", *lines])


def _domain(onnx_path: Path, operator: str, name: str) -> str:
    """The domain of the node that the parser refused; it tells the operator and the name alone."""
    nodes = [node for node in load_graph(onnx_path).graph.node if node.op_type == operator]
    return next((node.domain for node in nodes if node.name == name or len(nodes) == 1), "") or "ai.onnx"


def _make_logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, for they say why a call returned nothing; passes warnings on."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                logger.info("%s", message.strip())

        def last(self) -> str:
            return self.errors[-1] if self.errors else "no reason was given"

    return Log()


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of the outermost phase with steps; TensorRT calls from many threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, step + 1, self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            progress(phase, self.steps.get(phase, 0), self.steps.get(phase, 0))

    return Monitor()
