"""The plan of an engine that fits this machine: the one in the artifact, or one built from the ONNX file beside it."""

from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, request_digest
from deploy.engine.builder import build_engine, options_of
from deploy.engine.compatibility import fp8_refusal, has_fp8, mismatches, rtx_refusal
from deploy.engine.cuda import Gpu
from deploy.engine.flavour import Flavour
from deploy.errors import BackendError
from deploy.host.cache import ENGINES, cache_folder, keep, trim


def engine_plan(artifact: Artifact, flavour: Flavour, gpu: Gpu, *, rebuild: bool) -> bytes:
    """The bytes of the artifact's engine or, with `rebuild`, of one built from the typed ONNX file if that does not fit.

    Raises BackendError if it does not fit and `rebuild` is not set or no engine of the flavour would, EngineError if it cannot
    be built.
    """
    target = artifact.manifest.target
    assert target is not None
    if target.flavour == "tensorrt-rtx" and (refusal := rtx_refusal(gpu.name, gpu.compute_capability)):
        raise BackendError(f"{artifact.location} cannot run here: {refusal}")
    if artifact.manifest.precision == "fp8" and not has_fp8(gpu.compute_capability):
        raise BackendError(f"{artifact.location} cannot run here: {fp8_refusal(f'{gpu.name} ({gpu.compute_capability})')}")
    problems = mismatches(target, flavour.version, gpu)
    if not problems:
        return (artifact.path / ENGINE).read_bytes()
    if not rebuild:
        raise BackendError(
            f"{artifact.location} does not fit this machine: {'; '.join(problems)}; build it here, or open it with rebuild=True"
        )
    file = _rebuilt(artifact, flavour, gpu)
    if not file.is_file():
        profiles = list(artifact.manifest.profiles)
        built = build_engine(flavour, artifact.onnx_path, profiles, options_of(target, gpu), shown=artifact.shown)
        keep(file, built.plan, "the rebuilt engine")
        if file.is_file():
            trim(file.parent)
        return built.plan
    return file.read_bytes()


def _rebuilt(artifact: Artifact, flavour: Flavour, gpu: Gpu) -> Path:
    """The file in the cache for the engine that is built for this machine."""
    circumstances = {
        "artifact": artifact.manifest.digest,
        "flavour": [flavour.name, flavour.version],
        "gpu": [gpu.name, gpu.compute_capability],
    }
    return cache_folder() / ENGINES / f"{request_digest(circumstances)}.plan"
