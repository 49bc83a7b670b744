"""What a benchmark runs: which artifacts, on which backends, at which batch sizes, against which baseline."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.artifact import Artifact
from deploy.bench.shapes import bench_dims, parse_shapes
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.opening import artifacts_under
from deploy.runtime.session import AUTO, BACKENDS, refuse_engine
from deploy.tensors import batch_dim

BATCHES = (1, 8, 32)
"""Batch sizes where none are asked for and the artifact does not fix its own."""

_MODULE_BACKENDS = ("eager", "compile")
"""They run the module that all artifacts descend from, whatever the artifact."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to benchmark.

    backends: names from `BACKENDS`; empty: all of `AUTO` that are installed and can run the artifact. Eager PyTorch is
        the baseline in any case.
    batches: batch sizes; empty: `BATCHES`, or the fixed batch of the artifacts.
    seconds: time to spend on measuring, start and warm-up aside. Slow models take longer: every candidate runs in at
        least `MIN_ROUNDS` rounds.
    shapes: `NAME=SHAPE`, such as `input=1x3x224x224`, for inputs with dynamic dimensions; the batch in it is not used. One
        left out takes the optimum of its profile, or the size that the preprocessing makes of images.
    threads: of every candidate, eager too; None: the physical cores that may be used.
    device: of every candidate, eager too; `auto` is the CPU, for all backends but eager run there in this version.
    """

    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    seconds: float = 15.0
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in BACKENDS:
                raise UsageError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
        for batch in self.batches:
            if batch < 1:
                raise UsageError(f"the batch size must be 1 or more, not {batch}")
        parse_shapes(self.shapes)
        if not self.seconds > 0:
            raise UsageError(f"the seconds to spend must be more than 0, not {self.seconds:g}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be 1 or more, not {self.threads}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One artifact on one backend, the batch sizes it is to run at, and the sizes of all other symbolic dimensions."""

    artifact: Artifact
    backend: str
    batches: tuple[int, ...]
    dims: Mapping[str, int]

    def sizes(self, batch: int) -> dict[str, int]:
        """Sizes of all symbolic dimensions of the inputs."""
        name = batch_dim(self.artifact.manifest.inputs)
        return {**self.dims, name: batch} if name is not None else dict(self.dims)


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
    no eager baseline or a named artifact has lost its parent, BackendError when a named artifact is an engine.
    """
    if not artifacts:
        raise UsageError("nothing to benchmark: name an artifact")
    artifacts = list({artifact.location.absolute(): artifact for artifact in artifacts}.values())
    _check_weights(artifacts)
    roots = []
    runnable = []
    skipped = []
    for artifact in artifacts:
        target = artifact.manifest.target
        try:
            roots.append(artifact.root())
            refuse_engine(artifact)
        except (ArtifactError, BackendError) as error:
            if named:
                raise
            missing = target.flavour if target else "eager"
            skipped.append(Skipped(artifact=artifact.shown, backend=missing, reason=str(error)))
        else:
            runnable.append(artifact)
    if not roots:
        raise ArtifactError(f"nothing to benchmark: {skipped[0].reason}")
    named_so = {os.path.realpath(artifact.location): artifact for artifact in artifacts}
    root = _root([named_so.get(os.path.realpath(root.location), root) for root in roots])  # by the path that the user knows
    for artifact in runnable:
        _check_specs(root, artifact)
    dims = bench_dims(root.manifest, parse_shapes(options.shapes))
    batches = options.batches or _default_batches(runnable)
    candidates = []
    for artifact in runnable:
        fixed = _fixed_batch(artifact)
        fitting = tuple(batch for batch in batches if fixed in (None, batch))
        if options.batches and fitting != batches:
            raise UsageError(f"{artifact.shown} takes batches of {fixed} only; --batch asks for {_listed(batches)}")
        for backend in options.backends or AUTO:
            if backend not in _MODULE_BACKENDS:
                candidates.append(Candidate(artifact=artifact, backend=backend, batches=fitting, dims=dims))
    if "compile" in options.backends:
        candidates.append(Candidate(artifact=root, backend="compile", batches=batches, dims=dims))
    baseline = Candidate(artifact=root, backend="eager", batches=batches, dims=dims)
    return Plan(baseline=baseline, candidates=tuple(candidates), skipped=tuple(skipped))


def find_artifacts(build: Path = Path("build")) -> list[Artifact]:
    """All artifacts under `build` that descend from the same state_dict as the newest one, oldest first.

    One that cannot be opened is left out with a warning. Raises UsageError when there are none.
    """
    found = artifacts_under(build)
    if not found:
        raise UsageError(f"no artifacts under {build}: name one, or make one with `deploy export`")
    newest = found[-1].manifest.source.state_dict
    return [artifact for artifact in found if artifact.manifest.source.state_dict == newest]


def _check_weights(artifacts: Sequence[Artifact]) -> None:
    for other in artifacts[1:]:
        if other.manifest.source.state_dict != artifacts[0].manifest.source.state_dict:
            raise UsageError(
                f"{other.shown} and {artifacts[0].shown} do not descend from the same state_dict: benchmark them one at a time"
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


def _root(roots: Sequence[Artifact]) -> Artifact:
    """The export that the eager baseline is rebuilt from: one with a dynamic batch where there is one."""
    root = next((root for root in roots if _fixed_batch(root) is None), roots[0])
    if root.manifest.source.factory is None:
        raise ArtifactError(
            f"{root.shown} does not say which model it is made of, so there is no eager baseline to compare with:"
            " benchmark an artifact that `deploy export` made of a model"
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
