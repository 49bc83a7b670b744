"""What a benchmark runs: which artifacts, on which backends, at which batch sizes, against which baseline."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import artifacts_under
from deploy.artifact.tensors import batch_dim
from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.shapes import bench_dims, parse_shapes
from deploy.engine.cuda.driver import has_gpu
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.runtime.catalog import AUTO, BACKENDS, refuse_engine, split_backend
from deploy.runtime.load import import_backend

BATCHES = (1, 8, 32)
"""Batch sizes where none are asked for and the artifact does not fix its own."""

BASELINE = "eager"
"""What everything is compared with unless another is named."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to benchmark.

    baseline: what everything is compared with: a backend, with variants if any, that runs the export or its module.
    backends: names from `BACKENDS`, with variants if any (`eager:fp16,channels_last`); empty: all of `AUTO` that are
        installed and can run the artifact. Engines run on their flavour's, and on no other.
    batches: batch sizes; empty: `BATCHES`, or the fixed batch of the artifacts.
    seconds: time to spend on measuring, start and warm-up aside. Slow models take longer: every candidate runs in at
        least `MIN_ROUNDS` rounds.
    shapes: `NAME=SHAPE`, such as `input=1x3x224x224`, for inputs with dynamic dimensions; the batch in it is not used. One
        left out takes the optimum of its profile, or the size that the preprocessing makes of images.
    threads: of every candidate, eager too; None: the physical cores that may be used.
    device: of every candidate, eager too. `auto` is the GPU for what runs there only, and the CPU for what runs there
        only; for eager and compile it is the GPU where another candidate needs one, else the CPU.
    data: an ImageFolder whose images are the inputs; None: random numbers.
    evaluate: an ImageFolder that the accuracy of every candidate is measured on.
    loads: what else every candidate is put under, alone and at the first batch size, for `load_s` each.
    scenarios: those of MLPerf's LoadGen that every candidate goes through, for `load_s` at least; its logs go below `logs`.
    layers: also time the layers of every candidate, at the first batch size.
    skip_missing: a named backend that cannot run here is listed, and is no error.
    different_models: artifacts need not descend from the same state_dict; their inputs and outputs must still be alike.
    """

    baseline: str = BASELINE
    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    seconds: float = 12.0
    threads: int | None = None
    device: str = "auto"
    data: Path | None = None
    evaluate: Path | None = None
    loads: tuple[Load, ...] = ()
    load_s: float = 3.0
    scenarios: tuple[Scenario, ...] = ()
    logs: Path = Path("build/loadgen")
    layers: bool = False
    skip_missing: bool = False
    different_models: bool = False

    def __post_init__(self) -> None:
        for backend in (self.baseline, *self.backends):
            split_backend(backend)
        if split_backend(self.baseline)[0].runs == "engine":
            raise UsageError(f"--baseline {self.baseline}: an engine can be no baseline; name what runs the export or its module")
        for batch in self.batches:
            if batch < 1:
                raise UsageError(f"the batch size must be 1 or more, not {batch}")
        parse_shapes(self.shapes)
        if not self.seconds > 0:
            raise UsageError(f"the seconds to spend must be more than 0, not {self.seconds:g}")
        if not self.load_s > 0:
            raise UsageError(f"the seconds of each load must be more than 0, not {self.load_s:g}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be 1 or more, not {self.threads}")


class Named(TypedDict):
    """How the results name a candidate."""

    artifact: str
    precision: str
    backend: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One artifact on one backend, the batch sizes it is to run at, and the sizes of all other symbolic dimensions.

    device: what the session is opened with, see `SessionOptions`.
    """

    artifact: Artifact
    backend: str
    device: str
    batches: tuple[int, ...]
    dims: Mapping[str, int]

    def sizes(self, batch: int) -> dict[str, int]:
        """Sizes of all symbolic dimensions of the inputs."""
        name = batch_dim(self.artifact.manifest.inputs)
        return {**self.dims, name: batch} if name is not None else dict(self.dims)

    @property
    def named(self) -> Named:
        """The fields by which a row of the results says what it is of."""
        return Named(artifact=self.artifact.shown, precision=self.precision, backend=self.backend)

    @property
    def precision(self) -> str:
        """That of the artifact, or the half precision that the module is run in."""
        _, variant = split_backend(self.backend)
        return next((name for name in variant if name in ("fp16", "bf16")), self.artifact.manifest.precision)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was not measured, and why."""

    artifact: str
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    baseline: Candidate
    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]

    @property
    def batches(self) -> tuple[int, ...]:
        return self.baseline.batches


def make_plan(artifacts: Sequence[Artifact], options: BenchOptions, *, named: bool) -> Plan:
    """Pair artifacts with backends. `named`: the user named the artifacts, so that one that cannot run is an error.

    Raises UsageError when the artifacts do not belong together or a batch size or a shape does not fit, ArtifactError when there is
    no eager baseline or a named artifact has lost its parent, BackendError when a named artifact is an engine that cannot run
    here, or a named backend runs engines and there is none.
    """
    if not artifacts:
        raise UsageError("nothing to benchmark: name an artifact")
    artifacts = list({artifact.location.absolute(): artifact for artifact in artifacts}.values())
    if not options.different_models:
        _check_weights(artifacts)
    flavours = {artifact.manifest.target.flavour for artifact in artifacts if artifact.manifest.target is not None}
    roots = []
    runnable = []
    skipped = []
    for backend in options.backends:
        runner, _ = split_backend(backend)
        if runner.runs == "engine" and runner.name not in flavours:
            reason = f"{runner.name} runs engines, and no artifact here is one of its: build one with `deploy build-trt`"
            if not options.skip_missing:
                raise BackendError(reason)
            skipped += [Skipped(artifact=artifact.shown, backend=backend, reason=reason) for artifact in artifacts[:1]]
    for artifact in artifacts:
        target = artifact.manifest.target
        try:
            roots.append(artifact.root())
            if target is not None:
                _check_engine(artifact, options.backends)
        except (ArtifactError, BackendError) as error:
            if named:
                raise
            missing = target.flavour if target else BASELINE
            skipped.append(Skipped(artifact=artifact.shown, backend=missing, reason=str(error)))
        else:
            runnable.append(artifact)
    if not roots:
        raise ArtifactError(f"nothing to benchmark: {skipped[0].reason}")
    named_so = {os.path.realpath(artifact.location): artifact for artifact in artifacts}
    # By the path that the user knows.
    root = _root([named_so.get(os.path.realpath(root.location), root) for root in roots], options.baseline)
    for artifact in runnable:
        _check_specs(root, artifact)
    dims = bench_dims(root.manifest, parse_shapes(options.shapes))
    batches = options.batches or _default_batches(runnable)
    fitting = {}
    for artifact in runnable:
        fixed = _fixed_batch(artifact)
        fitting[artifact.location] = tuple(batch for batch in batches if fixed in (None, batch))
        if options.batches and fitting[artifact.location] != batches:
            raise UsageError(f"{artifact.shown} takes batches of {fixed} only; --batch asks for {_listed(batches)}")
    pairs = [(each, backend, fitting[each.location]) for each in runnable for backend in _backends(each, options.backends)]
    pairs += [(root, backend, batches) for backend in options.backends if _runs_module(backend)]
    pairs = [pair for pair in pairs if pair[:2] != (root, options.baseline)]
    on_gpu = any(_gpu_only(backend) for _, backend, _ in pairs)
    baseline, *candidates = (
        Candidate(artifact=artifact, backend=backend, device=_device(backend, options.device, on_gpu), batches=sizes, dims=dims)
        for artifact, backend, sizes in [(root, options.baseline, batches), *pairs]
    )
    return Plan(baseline=baseline, candidates=tuple(candidates), skipped=tuple(skipped))


def parse_backends(texts: Sequence[str]) -> tuple[str, ...]:
    """Backends of a command line, several in a text with commas between, as those of a variant have too.

    `["onnxruntime:cuda,openvino", "eager:fp16,channels_last"]` -> `("onnxruntime:cuda", "openvino",
    "eager:fp16,channels_last")`: what follows a comma belongs to the variant before it unless it is a backend.
    """
    found: list[str] = []
    for text in texts:
        for position, part in enumerate(text.split(",")):
            if position and ":" in found[-1] and part.partition(":")[0] not in BACKENDS:
                found[-1] += f",{part}"
            else:
                found.append(part)
    return tuple(dict.fromkeys(found))


def find_artifacts(build: Path = Path("build")) -> list[Artifact]:
    """All artifacts under `build` that descend from the same state_dict as the newest one, oldest first.

    One that cannot be opened is left out with a warning. Raises UsageError when there are none.
    """
    found = artifacts_under(build)
    if not found:
        raise UsageError(f"no artifacts under {build}: name one, or make one with `deploy export`")
    newest = found[-1].manifest.source.state_dict
    return [artifact for artifact in found if artifact.manifest.source.state_dict == newest]


def _check_engine(artifact: Artifact, backends: Sequence[str]) -> None:
    """Raise BackendError unless the engine can run here on one of `backends`, or on any where there are none."""
    found = _backends(artifact, backends)
    if not has_gpu() or not found:
        refuse_engine(artifact)
    import_backend(split_backend(found[0])[0])


def _backends(artifact: Artifact, backends: Sequence[str]) -> list[str]:
    """Those of `backends`, or of the default ones where there are none, that run the artifact and not the module."""
    target = artifact.manifest.target
    if target is not None:
        return [backend for backend in backends or (target.flavour,) if split_backend(backend)[0].name == target.flavour]
    return [backend for backend in backends or AUTO if split_backend(backend)[0].runs == "onnx"]


def _runs_module(backend: str) -> bool:
    return split_backend(backend)[0].runs == "module"


def _gpu_only(backend: str) -> bool:
    runner, variant = split_backend(backend)
    return runner.needs_gpu(variant)


def _device(backend: str, device: str, on_gpu: bool) -> str:
    """What a session is opened with; `on_gpu`: whether one of the candidates runs on a GPU only."""
    if device != "auto":
        return device
    return "cuda" if _gpu_only(backend) or (on_gpu and has_gpu() and _runs_module(backend)) else "cpu"


def _check_weights(artifacts: Sequence[Artifact]) -> None:
    for other in artifacts[1:]:
        if other.manifest.source.state_dict != artifacts[0].manifest.source.state_dict:
            raise UsageError(
                f"{other.shown} and {artifacts[0].shown} do not descend from the same state_dict: benchmark them one at a"
                " time, or allow it with --different-models"
            )


def _check_specs(root: Artifact, artifact: Artifact) -> None:
    """Raise UsageError unless the two have the same inputs and outputs, their dtypes and batch aside."""
    mine, its = root.manifest, artifact.manifest
    for ours, theirs in ((mine.inputs, its.inputs), (mine.outputs, its.outputs)):
        if [(spec.name, spec.shape[1:]) for spec in ours] != [(spec.name, spec.shape[1:]) for spec in theirs]:
            raise UsageError(
                f"{artifact.shown} has {', '.join(map(str, theirs))} where {root.shown} has"
                f" {', '.join(map(str, ours))}: benchmark them one at a time"
            )


def _root(roots: Sequence[Artifact], baseline: str) -> Artifact:
    """The export that the baseline runs, or is rebuilt from: one with a dynamic batch where there is one."""
    root = next((root for root in roots if _fixed_batch(root) is None), roots[0])
    if root.manifest.source.factory is None and _runs_module(baseline):
        raise ArtifactError(
            f"{root.shown} does not say which model it is made of, so there is no eager baseline to compare with:"
            " benchmark an artifact that `deploy export` made of a model, or name another --baseline, such as onnxruntime"
        )
    return root


def _fixed_batch(artifact: Artifact) -> int | None:
    """The batch size that the graph is made for, 1 where inputs have no batch; None when the batch is symbolic."""
    specs = artifact.manifest.inputs
    if batch_dim(specs) is not None:
        return None
    size = specs[0].shape[0] if specs and specs[0].shape else 1
    assert isinstance(size, int)
    return size


def _default_batches(artifacts: Sequence[Artifact]) -> tuple[int, ...]:
    fixed = [_fixed_batch(artifact) for artifact in artifacts]
    sizes = {size for size in fixed if size is not None}
    if None in fixed or not fixed:
        sizes.update(BATCHES)
    return tuple(sorted(sizes))


def _listed(batches: Sequence[int]) -> str:
    return ", ".join(map(str, batches))
