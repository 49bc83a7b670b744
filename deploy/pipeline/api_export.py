"""The public function that makes an artifact of a state_dict, with the options of the command of the same name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.artifact.find import BUILD
from deploy.artifact.manifest import Artifact
from deploy.errors import ArtifactError, OutputError, UsageError
from deploy.intake.build import parse_model_args
from deploy.intake.fit import Match
from deploy.pipeline.export import ExportOptions, export_artifact, export_onnx_file
from deploy.progress import Progress, silent

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

    What the options mean: `deploy.pipeline.export.ExportOptions`. `onnx` makes an artifact of a bare ONNX file
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
        target = Path(out) if out is not None else _default_out(name or Path(onnx).stem, "a bare ONNX file", keep_bare=False)
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
    default = name or (arch or model or "").rpartition(":")[2].lower()
    target = Path(out) if out is not None else BUILD / default if weights is not None else _default_out(default, "random weights")
    return export_artifact(target, options, progress)


def _default_out(name: str, less: str, *, keep_bare: bool = True) -> Path:
    """`build/<name>`. Raises OutputError when an artifact of trained weights stands there, for `less` would replace it unasked.

    Without `keep_bare` that is one that came from an eager module alone.
    """
    out = BUILD / name
    try:
        source = Artifact.open(out).manifest.source
    except ArtifactError:
        return out  # nothing there, or nothing that an export may not replace: the export itself looks
    if not source.random and (keep_bare or source.factory is not None):
        raise OutputError(
            f"{out} holds trained weights{f' ({source.weights})' if source.weights else ''}, and this export is of {less}:"
            " name another -o or --name, or delete it"
        )
    return out


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
