"""The stage `export`: a trained state_dict to an ONNX artifact, compared with the eager module."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from deploy.artifact.artifact import Artifact, standing
from deploy.artifact.find import BUILD
from deploy.artifact.manifest import FORMAT, ONNX, WEIGHTS, Manifest, Source, Stage, file_digest, request_digest
from deploy.artifact.onnxfile import check_onnx, model_specs, open_onnx, save_model
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import EXAMPLE_BATCH, TensorSpec, batch_dim, default_profile, example_dims, random_feeds
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.image_folder import data_digest
from deploy.errors import ArtifactError, OutputError, UsageError
from deploy.evidence.parity import PARITY_BATCHES, TOLERANCES, Tolerance
from deploy.host.versions import tool_versions
from deploy.intake.build import BuiltModel, build_model
from deploy.intake.exporter import export_graph
from deploy.intake.fit import Match
from deploy.intake.model_args import parse_model_args
from deploy.intake.weightsfile import save_weights
from deploy.pipeline.export_interface import (
    check_classes,
    default_preprocess,
    input_specs,
    load_preprocess,
    output_names,
    read_classes,
)
from deploy.pipeline.export_parity import REAL_IMAGES, Case, check_parity, finite, image_cases, run_eager
from deploy.pipeline.stage import PathLike, as_path
from deploy.progress import Progress, silent
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export and how. Exactly one of `arch` and `model`.

    arch: a reference architecture, `torchvision:NAME` or `timm:NAME`.
    model: `FILE.py:FACTORY` or `pkg.mod:FACTORY`, called with `model_args`.
    weights: the checkpoint; None for seeded random weights.
    match: pair tensors by `name` or by `order`. allow_partial: load what fits.
    inputs: `NAME=1x3x224x224[:dtype]`, by position; outputs: names, by position.
    static_batch: keep the leading 1 instead of a symbolic batch.
    preprocess: a preset or a JSON file. classes: a file with one class name a line. data: an ImageFolder for parity.
    """

    arch: str | None = None
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    match: Match = "name"
    allow_partial: bool = False
    num_classes: int | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    static_batch: bool = False
    preprocess: str | None = None
    classes: Path | None = None
    opset: int | None = None
    rtol: float | None = None
    atol: float | None = None
    name: str | None = None
    data: Path | None = None

    def __post_init__(self) -> None:
        if (self.arch is None) == (self.model is None):
            raise UsageError("name what to export: one of --arch, --model and --onnx")
        if self.match not in ("name", "order"):
            raise UsageError(f"match must be name or order, not {self.match!r}")
        if self.weights is None and (self.allow_partial or self.match != "name"):
            raise UsageError("--match and --allow-partial say how to load a checkpoint: give one with --weights")
        if self.opset is not None and not 18 <= self.opset <= 25:
            raise UsageError(f"--opset must be 18 to 25, not {self.opset}")
        _tolerance(self)  # checked now, not after the export


def export_artifact(out: Path, options: ExportOptions, progress: Progress = silent) -> Artifact:
    """Export to the artifact `out`; what was loaded and what was not is logged.

    Raises CheckpointError, FactoryError, ExportError, ParityError, OutputError, DataError, UsageError and BackendError
    (ONNX Runtime, which parity is checked on, is not installed). `out` is then as it was.
    """
    check_output(out)
    progress("building the module")
    built, report = build_model(
        arch=options.arch,
        model=options.model,
        args=options.model_args,
        num_classes=options.num_classes,
        weights=options.weights,
        match=options.match,
        allow_partial=options.allow_partial,
    )
    specs = input_specs(options.inputs, built, static_batch=options.static_batch)
    preprocess = load_preprocess(options.preprocess, specs) if options.preprocess else default_preprocess(built, specs)
    classes = read_classes(options.classes) if options.classes else None
    stage = _stage(options, built, specs, preprocess, classes)
    if (stood := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return stood
    if report is None:
        logger.warning("no --weights: the weights of %s are random", built.factory)
    else:
        logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report.summary())

    progress("running the eager module")
    files = [file.path for file in built.source_files]
    feeds = random_feeds(specs, example_dims(specs, batch_dim(specs)))
    first = run_eager(built.module, specs, feeds[0], files)
    outputs = output_names(options.outputs, built, specs, list(first))
    check_classes(classes, [array.shape for array in first.values()])
    seen = [
        Case("random", feed, dict(zip(outputs, results.values(), strict=True)))
        for feed, results in [
            (feeds[0], first),
            *((feed, run_eager(built.module, specs, feed, files, ran=feeds[0])) for feed in feeds[1:]),
        ]
    ]
    if not all(finite(case, fatal=options.data is None) for case in seen):
        seen = []
        logger.warning("the eager module gives NaN or infinity on random input: parity is checked on images alone")
    progress("exporting to ONNX")
    example = {name: torch.from_numpy(array) for name, array in feeds[PARITY_BATCHES.index(EXAMPLE_BATCH)].items()}
    graph = export_graph(built.module, specs, example, outputs, opset=options.opset, user_files=files)
    with ArtifactWriter(out) as writer:
        save_model(graph, writer.path / ONNX)
        check_onnx(writer.path / ONNX)
        save_weights(built.module, writer.path / WEIGHTS)
        inputs, found = model_specs(graph)
        profile = default_profile(inputs)
        manifest = Manifest(
            format=FORMAT,
            kind="onnx",
            name=options.name or out.resolve().name,
            precision="fp32",
            source=Source(
                factory=built.factory,
                args=dict(built.args),
                folder=built.folder,
                files=list(built.source_files),
                weights=options.weights.name if options.weights else None,
                state_dict="",
                random=options.weights is None,
            ),
            parent=None,
            files={},
            inputs=inputs,
            outputs=found,
            profiles=[profile] if profile else [],
            preprocess=preprocess,
            classes=classes,
            parity=None,
            accuracy=None,
            calibration=None,
            exclusions=[],
            tools=tool_versions(),
            stage=stage,
            created="",
        )
        written = writer.describe(manifest)
        progress("comparing with eager")
        if options.data is not None:
            seen += image_cases(written, built.module, options.data, files)
        with open_session(written, "onnxruntime", SessionOptions(device="cpu")) as session:
            parity = check_parity(session, seen, _tolerance(options))
        source = msgspec.structs.replace(manifest.source, state_dict=written.manifest.files[WEIGHTS].sha256)
        return writer.commit(msgspec.structs.replace(written.manifest, source=source, parity=parity))


def export_onnx_file(path: Path, out: Path, *, preprocess: str | None, classes: Path | None, name: str | None) -> Artifact:
    """A bare ONNX file to an artifact: a copy with a manifest. It has no eager module and no parity.

    Raises ArtifactError when the file is not valid ONNX, OutputError, UsageError.
    """
    bare = open_onnx(path)
    check_output(out, bare)
    names = read_classes(classes) if classes else None
    check_classes(names, [spec.shape for spec in bare.manifest.outputs])
    loaded = load_preprocess(preprocess, bare.manifest.inputs)
    with ArtifactWriter(out) as writer:
        for file in bare.manifest.files:
            shutil.copyfile(path.parent / file, writer.path / (ONNX if file == path.name else file))
        return writer.commit(
            msgspec.structs.replace(
                bare.manifest,
                name=name or out.resolve().name,
                files={},
                preprocess=loaded,
                classes=names,
                tools=tool_versions(),
            )
        )


def _tolerance(options: ExportOptions) -> Tolerance:
    default = TOLERANCES["fp32"]
    return Tolerance(
        rtol=default.rtol if options.rtol is None else options.rtol,
        atol=default.atol if options.atol is None else options.atol,
    )


def _stage(
    options: ExportOptions,
    built: BuiltModel,
    specs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    classes: list[str] | None,
) -> Stage:
    """Everything that the artifact depends on, as a digest."""
    request = {
        "factory": built.factory,
        "args": dict(built.args),
        "files": [[file.path, file.sha256] for file in built.source_files],
        "folder": built.folder,
        "weights": file_digest(options.weights) if options.weights else None,
        "match": options.match,
        "allow_partial": options.allow_partial,
        "inputs": [str(spec) for spec in specs],
        "outputs": list(options.outputs),
        "preprocess": preprocess.to_json() if preprocess else None,
        "classes": classes,
        "opset": options.opset,
        "tolerance": [options.rtol, options.atol],
        "name": options.name,
        "data": data_digest(options.data, REAL_IMAGES) if options.data else None,
        "tools": tool_versions(),
    }
    return Stage(name="export", request=request_digest(request))


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
        return export_onnx_file(Path(onnx), target, preprocess=preprocess, classes=as_path(classes), name=name)
    options = ExportOptions(
        arch=arch,
        model=model,
        model_args=model_args if isinstance(model_args, Mapping) else parse_model_args(model_args),
        weights=as_path(weights),
        match=match,
        allow_partial=allow_partial,
        num_classes=num_classes,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        static_batch=static_batch,
        preprocess=preprocess,
        classes=as_path(classes),
        opset=opset,
        rtol=rtol,
        atol=atol,
        name=name,
        data=as_path(data),
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
