"""The public functions that make artifacts, with the options of the commands of the same names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from deploy.artifact import Artifact
from deploy.engine.builder import BuildOptions
from deploy.errors import UsageError
from deploy.factory import parse_model_args
from deploy.opening import open_artifact
from deploy.pipeline.building import BuildTrtOptions, build_trt_artifact
from deploy.pipeline.conversion import ConvertOptions, convert_artifact
from deploy.pipeline.exporting import ExportOptions, export_artifact, export_onnx_file
from deploy.progress import Progress, silent
from deploy.weights import Match

BUILD = Path("build")
"""Where artifacts go when no directory is named."""

PathLike = Path | str


def export(
    out: PathLike | None = None,
    *,
    arch: str | None = None,
    model: str | None = None,
    onnx: PathLike | None = None,
    model_args: Mapping[str, Any] | Sequence[str] = (),
    weights: PathLike | None = None,
    match: Match = "name",
    allow_partial: bool = False,
    num_classes: int | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    static_batch: bool = False,
    preprocess: str | None = None,
    classes: PathLike | None = None,
    data: PathLike | None = None,
    opset: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Export a trained state_dict to the ONNX artifact `out` (default `build/<name>`), checked against eager.

    What the options mean: `deploy.pipeline.exporting.ExportOptions`. `onnx` makes an artifact of a bare ONNX file
    instead, with `preprocess`, `classes` and `name` only. Raises a DeployError; nothing that stood at `out` is lost then.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise UsageError(f"--name must be a plain name, not {name!r}: it is also the name of the folder and of the served model")
    if onnx is not None:
        given = {
            "--arch": arch, "--model": model, "--weights": weights, "--model-arg": model_args, "--input": inputs, "--output": outputs,
            "--num-classes": num_classes, "--static-batch": static_batch, "--data": data, "--opset": opset, "--rtol": rtol,
            "--atol": atol, "--allow-partial": allow_partial, "--match": None if match == "name" else match,
        }  # fmt: skip
        if unfit := [option for option, value in given.items() if value not in (None, False, (), [], {})]:
            raise UsageError(f"--onnx takes the graph as it is; leave out {', '.join(unfit)}")
        target = Path(out) if out is not None else BUILD / (name or Path(onnx).stem)
        return export_onnx_file(Path(onnx), target, preprocess=preprocess, classes=_path(classes), name=name)
    options = ExportOptions(
        arch=arch,
        model=model,
        model_args=model_args if isinstance(model_args, Mapping) else parse_model_args(model_args),
        weights=_path(weights),
        match=match,
        allow_partial=allow_partial,
        num_classes=num_classes,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        static_batch=static_batch,
        preprocess=preprocess,
        classes=_path(classes),
        opset=opset,
        rtol=rtol,
        atol=atol,
        name=name,
        data=_path(data),
    )
    default = (arch or model or "").rpartition(":")[2].lower()
    return export_artifact(Path(out) if out is not None else BUILD / (name or default), options, progress)


def convert(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: Literal["fp16", "bf16"],
    fp16_io: bool = False,
    data: PathLike | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Convert an FP32 ONNX artifact to half precision, checked against it; `out` is `build/<name>-<precision>` by default.

    Inputs and outputs stay FP32 unless `fp16_io`. `data` is an ImageFolder for activation ranges and parity. Raises a
    DeployError; nothing that stood at `out` is lost then.
    """
    source = _open(artifact)
    options = ConvertOptions(precision=precision, fp16_io=fp16_io, data=_path(data))
    return convert_artifact(source, _out(out, source, precision), options, progress)


def build_trt(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: Literal["fp16", "bf16"] | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    opt_level: int | None = None,
    tf32: bool = False,
    timing_cache: PathLike | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Build a TensorRT engine artifact; `out` is `build/<name>[-<precision>]-trt` by default.

    What the options mean: `deploy.pipeline.building.BuildTrtOptions` and `deploy.engine.builder.BuildOptions`. Raises a
    DeployError; nothing that stood at `out` is lost then.
    """
    source = _open(artifact)
    options = BuildTrtOptions(
        precision=precision,
        fp16_io=fp16_io,
        data=_path(data),
        flavour=flavour,
        shapes=tuple(shapes),
        build=BuildOptions(
            opt_level=opt_level,
            tf32=tf32,
            timing_cache=_path(timing_cache),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        ),
    )
    return build_trt_artifact(source, _out(out, source, *([precision] if precision else []), "trt"), options, progress)


def _open(artifact: Artifact | PathLike) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _out(out: PathLike | None, source: Artifact, *suffixes: str) -> Path:
    return Path(out) if out is not None else BUILD / "-".join([source.manifest.name, *suffixes])
