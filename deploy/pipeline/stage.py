"""The public functions that turn artifacts into others, with the options of the commands of the same names.

`deploy.export` is apart, in `api_export`, for it alone needs torch.
"""

from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import BUILD, open_artifact
from deploy.errors import UsageError
from deploy.evaluation.gate import Gate

PathLike = Path | str


def check_fp32(artifact: Artifact) -> None:
    """Raise UsageError unless `artifact` can be quantized."""
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        raise UsageError(f"{artifact.shown} is an engine; give the FP32 ONNX artifact that it descends from")
    if manifest.precision != "fp32":
        raise UsageError(f"{artifact.shown} is {manifest.precision} already; give the FP32 artifact that it was made from")


def make_gate(folder: PathLike | None, max_drop: float | None) -> Gate | None:
    if max_drop is not None and folder is None:
        raise UsageError("--max-drop goes with --eval, the images that accuracy is measured on")
    return None if folder is None else Gate(folder=Path(folder), max_drop=1.0 if max_drop is None else max_drop)


def open_source(artifact: Artifact | PathLike) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact)


def as_path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def default_out(out: PathLike | None, source: Artifact, *suffixes: str) -> Path:
    return Path(out) if out is not None else BUILD / "-".join([source.manifest.name, *suffixes])
