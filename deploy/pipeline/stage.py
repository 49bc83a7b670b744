"""The public functions that turn artifacts into others, with the options of the commands of the same names.

`deploy.export` is apart, in `api_export`, for it alone needs torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from deploy.artifact.find import BUILD, open_artifact
from deploy.artifact.manifest import Artifact
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.engine.builder import BuildOptions
from deploy.errors import UsageError
from deploy.evaluation.gate import Gate
from deploy.pipeline.build_trt import BuildTrtOptions, Preflight, build_trt_artifact
from deploy.pipeline.build_trt import preflight as check_before_build
from deploy.pipeline.convert import ConvertOptions, convert_artifact
from deploy.pipeline.quantize import METHOD, QuantizeOptions, check_fp32, quantize_artifact
from deploy.progress import Progress, silent

PathLike = Path | str


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


def quantize(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]],
    method: str = METHOD,
    images: int | None = None,
    batch_size: int = 2,
    per_tensor: bool = False,
    exclude: Sequence[str] = (),
    float_first: bool = False,
    float_last: bool = False,
    bias_correction: bool = True,
    equalize: bool | None = None,
    fp16: bool = False,
    eval_folder: PathLike | None = None,
    max_drop: float | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Turn an FP32 ONNX artifact into INT8 with explicit Q/DQ; `out` is `build/<name>-int8` by default.

    `calib`: an ImageFolder, a folder of `.npz` feeds, or feeds (arrays by input name). `fp16`: what is not INT8 is FP16
    (`build/<name>-int8-fp16`). What the other options mean: `deploy.pipeline.quantize.QuantizeOptions`. With `eval_folder`, an ImageFolder, accuracy is compared before and
    after, and more than `max_drop` points (default 1) of top-1 lost is an AccuracyError. Raises a DeployError; nothing
    that stood at `out` is lost then.
    """
    source = _open(artifact)
    options = QuantizeOptions(
        method=method,
        batch_size=batch_size,
        per_tensor=per_tensor,
        exclude=tuple(exclude),
        float_first=float_first,
        float_last=float_last,
        bias_correction=bias_correction,
        equalize=equalize,
        floats="fp16" if fp16 else "fp32",
    )
    gate = _gate(eval_folder, max_drop)
    check_fp32(source)
    data = calibration_set(source, calib, images)
    suffixes = ["int8", "fp16"] if fp16 else ["int8"]
    return quantize_artifact(source, _out(out, source, *suffixes), data, options, gate, progress)


def build_trt(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: Literal["fp16", "bf16"] | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    eval_folder: PathLike | None = None,
    max_drop: float | None = None,
    quantization: QuantizeOptions | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    targets: Sequence[str] = (),
    opt_level: int | None = None,
    tf32: bool = False,
    workspace: int | None = None,
    timing_cache: PathLike | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    allow_slower: bool = False,
    cache: bool = True,
    progress: Progress = silent,
) -> Artifact:
    """Build a TensorRT engine artifact; `out` is `build/<name>[-<precision>]-trt` by default.

    `int8` quantizes an FP32 artifact first, as `quantize` does with `calib`, `images`, `eval_folder`, `max_drop` and the
    options in `quantization`. What the others mean: `deploy.pipeline.build_trt.BuildTrtOptions` and
    `deploy.engine.builder.BuildOptions`. Raises a DeployError; nothing that stood at `out` is lost then.
    """
    source = _open(artifact)
    _check_int8(int8, calib, images, quantization)
    if not int8 and (eval_folder is not None or max_drop is not None):
        raise UsageError("--eval and --max-drop go with --int8")
    options = BuildTrtOptions(
        precision=precision,
        fp16_io=fp16_io,
        data=_path(data),
        int8=(quantization or QuantizeOptions()) if int8 else None,
        flavour=flavour,
        shapes=tuple(shapes),
        allow_slower=allow_slower,
        cache=cache,
        build=BuildOptions(
            opt_level=opt_level,
            tf32=tf32,
            workspace=workspace,
            targets=tuple(targets),
            timing_cache=_path(timing_cache),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        ),
    )
    data_set = _calibration(source, calib, images)
    suffixes = ["int8"] * int8 + ([precision] if precision else []) + ["trt"]
    return build_trt_artifact(source, _out(out, source, *suffixes), options, data_set, _gate(eval_folder, max_drop), progress)


def preflight(
    artifact: Artifact | PathLike,
    *,
    precision: Literal["fp16", "bf16"] | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    quantization: QuantizeOptions | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    progress: Progress = silent,
) -> Preflight:
    """Whether TensorRT's parser takes the model as `build_trt` would give it to it; nothing is built, and no GPU is needed.

    The options are those of `build_trt`. Raises EngineError listing every node that is refused, by its ONNX name, with the
    reason and a remedy; and what the conversion raises.
    """
    source = _open(artifact)
    _check_int8(int8, calib, images, quantization)
    options = BuildTrtOptions(
        precision=precision,
        fp16_io=fp16_io,
        data=_path(data),
        int8=(quantization or QuantizeOptions()) if int8 else None,
        flavour=flavour,
        shapes=tuple(shapes),
    )
    return check_before_build(source, options, _calibration(source, calib, images), progress)


def _check_int8(int8: bool, calib: object, images: int | None, quantization: QuantizeOptions | None) -> None:
    if not int8 and (calib is not None or images is not None):
        raise UsageError("--calib and --images go with --int8")
    if not int8 and quantization not in (None, QuantizeOptions()):
        raise UsageError("the options of quantization go with --int8")


def _calibration(
    source: Artifact, calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None, images: int | None
) -> CalibrationSet | None:
    return None if calib is None or source.manifest.precision == "int8" else calibration_set(source, calib, images)


def _gate(folder: PathLike | None, max_drop: float | None) -> Gate | None:
    if max_drop is not None and folder is None:
        raise UsageError("--max-drop goes with --eval, the images that accuracy is measured on")
    return None if folder is None else Gate(folder=Path(folder), max_drop=1.0 if max_drop is None else max_drop)


def _open(artifact: Artifact | PathLike) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _out(out: PathLike | None, source: Artifact, *suffixes: str) -> Path:
    return Path(out) if out is not None else BUILD / "-".join([source.manifest.name, *suffixes])
