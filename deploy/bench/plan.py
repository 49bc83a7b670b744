"""The plan of a benchmark: which artifacts run on which backends, at which batch sizes, against which baseline."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import artifacts_under
from deploy.artifact.tensors import batch_dim
from deploy.bench.options import BASELINE, BenchOptions
from deploy.bench.shapes import bench_dims, read_shapes
from deploy.engine.cuda.driver import has_gpu
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.runtime.catalog import AUTO, own_backend, refuse_compiled, split_backend
from deploy.runtime.load import import_backend

_COMPILED = {"engine": ("engines", "build-trt"), "package": ("AOTInductor packages", "build-aoti")}
"""What a backend runs that is built for it alone, and the command that builds it."""

BATCHES = (1, 8, 32)
"""Batch sizes unless the user asks for others or the artifact has a fixed one."""


class Named(TypedDict):
    """The fields by which results name a candidate."""

    artifact: str
    precision: str
    backend: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One artifact on one backend, the batch sizes to run it at, and the sizes of all other symbolic dimensions.

    device: the device of its session, see `SessionOptions`.
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
        """The fields that name it in a row of the results."""
        return Named(artifact=self.artifact.shown, precision=self.precision, backend=self.backend)

    def skipped(self, reason: str) -> "Skipped":
        """The entry of the results when this candidate is not measured."""
        return Skipped(artifact=self.artifact.shown, backend=self.backend, reason=reason)

    @property
    def precision(self) -> str:
        """The precision of the artifact, or the half precision that the module runs in."""
        _, variant = split_backend(self.backend)
        return next((name for name in variant if name in ("fp16", "bf16")), self.artifact.manifest.precision)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A candidate or an artifact that was not measured, and why."""

    artifact: str
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The baseline, the candidates to compare with it, and what cannot run here."""

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
    skipped = _without_engine(artifacts, options)
    roots, runnable, lost = _runnable(artifacts, options.backends, named=named)
    skipped += lost
    if not roots:
        raise ArtifactError(f"nothing to benchmark: {skipped[0].reason}")
    root = _root(_as_named(roots, artifacts), options.baseline)
    for artifact in runnable:
        _check_specs(root, artifact)
    dims = bench_dims(root.manifest, read_shapes(options.shapes))
    batches = options.batches or _default_batches(runnable)
    pairs = [
        (artifact, backend, _fitting(artifact, batches, options.batches))
        for artifact in runnable
        for backend in _backends(artifact, options.backends)
    ]
    pairs += [(root, backend, batches) for backend in options.backends if _runs_module(backend)]
    pairs = [pair for pair in pairs if pair[:2] != (root, options.baseline)]
    on_gpu = any(_gpu_only(artifact, backend) for artifact, backend, _ in pairs)
    baseline, *candidates = (
        Candidate(
            artifact=artifact,
            backend=backend,
            device=_device(artifact, backend, options.device, on_gpu),
            batches=sizes,
            dims=dims,
        )
        for artifact, backend, sizes in [(root, options.baseline, batches), *pairs]
    )
    return Plan(baseline=baseline, candidates=tuple(candidates), skipped=tuple(skipped))


def _without_engine(artifacts: Sequence[Artifact], options: BenchOptions) -> list[Skipped]:
    """The named backends that run engines or packages, of which there is none here. Raises BackendError unless they may be missing."""
    own = {own_backend(artifact) for artifact in artifacts}
    skipped = []
    for backend in options.backends:
        runner, _ = split_backend(backend)
        if runner.runs in _COMPILED and runner.name not in own:
            what, command = _COMPILED[runner.runs]
            reason = f"{runner.name} runs {what}, and no artifact here is one of its: build one with `deploy {command}`"
            if not options.skip_missing:
                raise BackendError(reason)
            skipped.append(Skipped(artifact=artifacts[0].shown, backend=backend, reason=reason))
    return skipped


def _runnable(
    artifacts: Sequence[Artifact], backends: Sequence[str], *, named: bool
) -> tuple[list[Artifact], list[Artifact], list[Skipped]]:
    """The exports that the artifacts descend from, the artifacts that can run here, and the others with the reason.

    Raises ArtifactError or BackendError for one of the others that was `named`.
    """
    roots, runnable, skipped = [], [], []
    for artifact in artifacts:
        own = own_backend(artifact)
        try:
            roots.append(artifact.root())
            if own is not None:
                _check_compiled(artifact, backends)
        except (ArtifactError, BackendError) as error:
            if named:
                raise
            skipped.append(Skipped(artifact=artifact.shown, backend=own or BASELINE, reason=str(error)))
        else:
            runnable.append(artifact)
    return roots, runnable, skipped


def _as_named(roots: Sequence[Artifact], artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The roots by the paths that the user knows, where they are among `artifacts`."""
    known = {os.path.realpath(artifact.location): artifact for artifact in artifacts}
    return [known.get(os.path.realpath(root.location), root) for root in roots]


def _fitting(artifact: Artifact, batches: Sequence[int], asked: Sequence[int]) -> tuple[int, ...]:
    """Those of `batches` that the artifact takes. Raises UsageError when it cannot take one that was `asked` for."""
    fixed = _fixed_batch(artifact)
    fitting = tuple(batch for batch in batches if fixed in (None, batch))
    if asked and len(fitting) != len(batches):
        raise UsageError(f"{artifact.shown} takes batches of {fixed} only; `batches` asks for {', '.join(map(str, asked))}")
    return fitting


def find_artifacts(build: Path = Path("build")) -> list[Artifact]:
    """All artifacts under `build` that descend from the same state_dict as the newest one, oldest first.

    An artifact that cannot be opened is left out with a warning. Raises UsageError when there are none.
    """
    artifacts = artifacts_under(build)
    if not artifacts:
        raise UsageError(f"no artifacts under {build}: name one, or make one with `deploy export`")
    newest = artifacts[-1].manifest.source.state_dict
    return [artifact for artifact in artifacts if artifact.manifest.source.state_dict == newest]


def _check_compiled(artifact: Artifact, backends: Sequence[str]) -> None:
    """Raise BackendError unless the engine or package can run here, on one of `backends` if any are named."""
    usable = _backends(artifact, backends)
    if not usable or (artifact.manifest.kind == "engine" and not has_gpu()):
        refuse_compiled(artifact)
    import_backend(split_backend(usable[0])[0])


def _backends(artifact: Artifact, backends: Sequence[str]) -> list[str]:
    """Those of `backends`, by default of `AUTO`, that run the artifact itself and not the module."""
    own = own_backend(artifact)
    if own is not None:
        return [backend for backend in backends or (own,) if split_backend(backend)[0].name == own]
    return [backend for backend in backends or AUTO if split_backend(backend)[0].runs == "onnx"]


def _runs_module(backend: str) -> bool:
    return split_backend(backend)[0].runs == "module"


def _gpu_only(artifact: Artifact, backend: str) -> bool:
    runner, variant = split_backend(backend)
    package = artifact.manifest.package
    return runner.needs_gpu(variant) or (package is not None and package.device == "cuda")


def _device(artifact: Artifact, backend: str, device: str, on_gpu: bool) -> str:
    """The device of a session; `on_gpu`: whether one of the candidates runs only on a GPU."""
    if device != "auto":
        return device
    return "cuda" if _gpu_only(artifact, backend) or (on_gpu and has_gpu() and _runs_module(backend)) else "cpu"


def _check_weights(artifacts: Sequence[Artifact]) -> None:
    for other in artifacts[1:]:
        if other.manifest.source.state_dict != artifacts[0].manifest.source.state_dict:
            raise UsageError(
                f"{other.shown} and {artifacts[0].shown} do not descend from the same state_dict: benchmark them one at a"
                " time, or allow it with `different_models`"
            )


def _check_specs(root: Artifact, artifact: Artifact) -> None:
    """Raise UsageError unless the two have the same inputs and outputs; dtypes and batch may differ."""
    mine, its = root.manifest, artifact.manifest
    for ours, theirs in ((mine.inputs, its.inputs), (mine.outputs, its.outputs)):
        if [(spec.name, spec.shape[1:]) for spec in ours] != [(spec.name, spec.shape[1:]) for spec in theirs]:
            raise UsageError(
                f"{artifact.shown} has {', '.join(map(str, theirs))} where {root.shown} has"
                f" {', '.join(map(str, ours))}: benchmark them one at a time"
            )


def _root(roots: Sequence[Artifact], baseline: str) -> Artifact:
    """The export that the baseline runs, or is rebuilt from: one with a dynamic batch if possible."""
    root = next((root for root in roots if _fixed_batch(root) is None), roots[0])
    if root.manifest.source.factory is None and _runs_module(baseline):
        raise ArtifactError(
            f"{root.shown} does not name the model that it was made from, so there is no eager baseline to compare with:"
            " benchmark an artifact that `deploy export` made from a model, or name another `baseline`, such as onnxruntime"
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
