"""The build of a TensorRT engine from a typed network, the same for every flavour.

Networks are always strongly typed: each tensor has the precision in the ONNX file, and no builder flag can change it. TF32 would
silently change FP32, so it is off unless requested.
"""

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.artifact.manifest import Target
from deploy.artifact.tensors import Profile
from deploy.engine.bindings import Bindings
from deploy.engine.compatibility import fp8_refusal, has_fp8, rtx_refusal, targeted
from deploy.engine.cuda import Gpu, open_device
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import RTX_TARGETS, Flavour
from deploy.engine.network import Network, parse_network
from deploy.engine.options import BuildOptions
from deploy.engine.timing_cache import save_timing_cache, use_timing_cache
from deploy.errors import BackendError, EngineError, UsageError
from deploy.progress import Progress, silent

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A serialized engine, the network that it was built from, and the target that it was built for."""

    plan: bytes
    network: Network
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
    """Parse an ONNX file and build an engine with these optimization profiles. shown: the name of the file in errors.

    Ctrl-C stops the build at TensorRT's next step and is then raised. Raises EngineError for nodes that the parser refuses (each
    by its ONNX name, with a remedy) and for a failed build, and what `checked` raises.
    """
    trt = flavour.trt
    shown = shown or str(onnx_path)
    options = checked(flavour, options)
    progress("parsing", 0, 0)
    network = parse_network(flavour, onnx_path, shown=shown)
    config = network.builder.create_builder_config()
    _set_options(config, flavour, options)
    for profile in profiles:
        _add_profile(network.builder, config, trt, profile)
    cache = use_timing_cache(config, options.timing_cache) if options.timing_cache else None
    plan = _build(network, config, trt, progress)
    if plan is None:
        raise EngineError(f"{flavour.name} {flavour.version} could not build {shown}: {network.log.last()}")
    if cache is not None and options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache)
    return BuiltEngine(plan=bytes(plan), network=network, target=_target(flavour, options))


def checked(flavour: Flavour, options: BuildOptions, *, fp8: bool = False) -> BuildOptions:
    """The options as they hold for the flavour on this machine. fp8: the network computes in FP8, which older GPUs do not.

    Raises UsageError for those that it does not have, BackendError for what it cannot do here.
    """
    options = _checked_for(flavour, options)
    if not fp8:
        return options
    if options.hardware_compatible:
        raise UsageError(f"`hardware_compatible` is for every GPU from compute capability 8.0 on: {fp8_refusal('8.0')}")
    if flavour.name != "tensorrt-rtx":
        gpu = open_device().gpu()
        if not has_fp8(gpu.compute_capability):
            raise BackendError(fp8_refusal(f"{gpu.name} ({gpu.compute_capability})"))
        return options
    if older := [target for target in options.targets if not has_fp8(target)]:
        raise UsageError(f"`targets` {', '.join(older)}: {fp8_refusal(older[0])}")
    return dataclasses.replace(options, targets=options.targets or tuple(filter(has_fp8, RTX_TARGETS)))


def _checked_for(flavour: Flavour, options: BuildOptions) -> BuildOptions:
    if flavour.name != "tensorrt-rtx":
        if options.targets:
            raise UsageError("`targets` is for the flavour tensorrt-rtx; tensorrt builds for the GPU that it runs on")
        return options
    if options.timing_cache is not None:
        raise UsageError("`timing_cache`: tensorrt-rtx times nothing while building; leave it out")
    if options.version_compatible or options.hardware_compatible:
        raise UsageError("`version_compatible` and `hardware_compatible` are for the flavour tensorrt; tensorrt-rtx has neither")
    return dataclasses.replace(options, targets=_strip_targets(options.targets)) if options.strip else options


def _strip_targets(targets: Sequence[str]) -> tuple[str]:
    """The one compute capability that tensorrt-rtx builds an engine without weights for; by default that of the GPU here.

    It needs a GPU for that, and takes one capability alone ("CPU-Only AOT and TensorRT-RTX Engines", "Weightless Engines"; 1.7.1
    fails on a machine without: "graph_jit.cpp: CHECK(status == CUDA_SUCCESS)").
    """
    if not has_gpu():
        raise BackendError("`strip`: tensorrt-rtx leaves weights out only on a machine with a GPU, and there is none here")
    gpu = open_device().gpu()
    if refusal := rtx_refusal(gpu.name, gpu.compute_capability):
        raise BackendError(f"`strip` needs a GPU that tensorrt-rtx runs on: {refusal}")
    if len(targets) > 1:
        raise UsageError("`strip` with tensorrt-rtx takes one of the `targets` alone: build an engine for each")
    return (targets[0] if targets else gpu.compute_capability,)


def _set_options(config: "tensorrt.IBuilderConfig", flavour: Flavour, options: BuildOptions) -> None:
    trt = flavour.trt
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)  # else STRIP_PLAN means REFIT_IDENTICAL, which takes no other weights
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.targets:
        _set_targets(config, trt, flavour, options.targets)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector reports every layer's precision


def _set_targets(config: Any, trt: Any, flavour: Flavour, targets: Sequence[str]) -> None:
    """Set the compute capabilities that the engine gets code for. Only tensorrt-rtx has them."""
    config.num_compute_capabilities = len(targets)  # must be set first, or every capability is refused
    for index, target in enumerate(targets):
        capability = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
        if capability is None or not config.set_compute_capability(capability, index):
            known = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
            listed = ", ".join(f"{name[:-1]}.{name[-1]}" for name in known)
            raise UsageError(f"`targets` {target}: {flavour.name} {flavour.version} builds for {listed}, and not for it")


def _add_profile(builder: "tensorrt.Builder", config: "tensorrt.IBuilderConfig", trt: Bindings, profile: Profile) -> None:
    optimization = builder.create_optimization_profile()
    for name, shapes in profile.items():
        optimization.set_shape(name, *(trt.Dims(list(shape)) for shape in (shapes.min, shapes.opt, shapes.max)))
    if config.add_optimization_profile(optimization) < 0:
        raise EngineError("TensorRT refused the profile " + ", ".join(f"{name}={shapes}" for name, shapes in profile.items()))


def _target(flavour: Flavour, options: BuildOptions) -> Target:
    target = Target(
        flavour=flavour.name,
        version=flavour.version,
        gpu=None,
        compute_capability=None,
        targets=list(options.targets or RTX_TARGETS),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        stripped=options.strip,
        opt_level=options.opt_level,
        tf32=options.tf32,
        workspace=options.workspace,
    )
    if flavour.builds_without_gpu:
        return target
    gpu = open_device().gpu()
    return msgspec.structs.replace(
        target,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        targets=[gpu.compute_capability],
        driver=gpu.driver,
    )


def options_of(target: Target, gpu: Gpu) -> BuildOptions:
    """The options that build an engine for `gpu` like the one that was built for `target`."""
    here = gpu.compute_capability
    named = target.flavour == "tensorrt-rtx" and not targeted(here, RTX_TARGETS)
    return BuildOptions(
        opt_level=target.opt_level,
        tf32=target.tf32,
        workspace=target.workspace,
        version_compatible=target.version_compatible,
        hardware_compatible=target.hardware_compatible,
        strip=target.stripped,
        targets=(here,) if named else (),
    )


def _build(network: Network, config: "tensorrt.IBuilderConfig", trt: Bindings, progress: Progress) -> Any:
    """The plan, or None. It is built in a thread so that the main thread, which is Python's for signals, notices Ctrl-C."""
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    outcome: list[Any] = []
    begun, done = threading.Event(), threading.Event()  # Thread.join forgets a thread once Ctrl-C interrupts it (CPython 90882)

    def work() -> None:
        begun.set()
        try:
            if monitor.cancelled.is_set():
                return
            outcome.append(network.builder.build_serialized_network(network.definition, config))
        except BaseException as error:
            outcome.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="deploy build", daemon=True).start()
        done.wait()
    except BaseException:
        monitor.cancelled.set()  # TensorRT checks it at every step
        if begun.is_set():  # else Ctrl-C came before the thread did, which will then do nothing
            done.wait()
        raise
    if monitor.failure is not None:
        raise monitor.failure
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _make_monitor(trt: Bindings, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Reports phases and steps. TensorRT calls it from many threads, and an exception must not reach TensorRT."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = threading.Event()
            self.failure: BaseException | None = None
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._steps[phase] = steps
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return not self.cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            self._report(phase, self._steps.get(phase, 0))

        def _report(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:
                self.failure = self.failure or error
                self.cancelled.set()

    return Monitor()
