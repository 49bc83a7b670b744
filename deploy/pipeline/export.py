"""The stage `export`: a trained state_dict to an ONNX artifact, compared with the eager module."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from deploy.artifact.manifest import (
    FORMAT,
    ONNX,
    WEIGHTS,
    Artifact,
    Manifest,
    Source,
    Stage,
    file_digest,
    request_digest,
    standing,
)
from deploy.artifact.onnxfile import check_onnx, model_specs, open_onnx, save_model
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import EXAMPLE_BATCH, TensorSpec, batch_dim, default_profile, example_dims
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.images import image_feeds
from deploy.errors import ExportError, UsageError
from deploy.evidence.parity import PARITY_BATCHES, TOLERANCES, Parity, Tolerance, compare
from deploy.intake.build import BuiltModel, build_model
from deploy.intake.export_errors import fixed_reason, line_of
from deploy.intake.exporter import export_graph, flatten_outputs
from deploy.intake.fit import Match, save_weights
from deploy.pipeline.export_interface import (
    check_classes,
    default_preprocess,
    input_specs,
    load_preprocess,
    output_names,
    read_classes,
)
from deploy.pipeline.lineage import data_digest, random_feeds, tool_versions
from deploy.precision.cpu import ONNXRUNTIME_VERSION
from deploy.progress import Progress, silent
from deploy.runtime.session import Session, SessionOptions, open_session

logger = logging.getLogger(__name__)

_REAL_IMAGES = 8
"""Real images that parity is checked on, at the largest of `PARITY_BATCHES` or the model's own batch."""


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
    first = _eager(built.module, specs, feeds[0], files)
    outputs = output_names(options.outputs, built, specs, list(first))
    check_classes(classes, [array.shape for array in first.values()])
    seen = [
        _Case("random", feed, dict(zip(outputs, results.values(), strict=True)))
        for feed, results in [
            (feeds[0], first),
            *((feed, _eager(built.module, specs, feed, files, ran=feeds[0])) for feed in feeds[1:]),
        ]
    ]
    if not all(_finite(case, fatal=options.data is None) for case in seen):
        seen = []
        logger.warning("the eager module gives NaN or infinity on random input: parity is checked on images alone")
    progress("exporting to ONNX")
    example = {name: torch.from_numpy(array) for name, array in feeds[PARITY_BATCHES.index(EXAMPLE_BATCH)].items()}
    graph = export_graph(built.module, specs, example, outputs, opset=options.opset, user_files=files)
    with ArtifactWriter(out) as writer:
        save_model(graph.model, writer.path / ONNX)
        check_onnx(writer.path / ONNX)
        save_weights(built.module, writer.path / WEIGHTS)
        inputs, found = model_specs(graph.model)
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
            seen += _image_cases(written, built.module, options.data, files)
        with open_session(written, "onnxruntime", SessionOptions(device="cpu")) as session:
            parity = _parity(session, seen, _tolerance(options))
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
        "files": [file.sha256 for file in built.source_files],
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
        "data": data_digest(options.data, _REAL_IMAGES) if options.data else None,
        "tools": tool_versions(),
    }
    return Stage(name="export", request=request_digest(request))


class _Case(NamedTuple):
    """One feed, and what the eager module makes of it, by output name. `data` is `random` or `images`."""

    data: str
    feed: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def _eager(
    module: torch.nn.Module,
    specs: Sequence[TensorSpec],
    feed: Mapping[str, np.ndarray],
    user_files: Sequence[str],
    ran: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The eager module's outputs, flattened. `ran` is a feed that it could run, of another batch size.

    Raises ExportError, with the module's own error and its line in the user's own file, when it cannot run the input.
    """
    try:
        with torch.inference_mode():
            results = flatten_outputs(module(*(torch.from_numpy(feed[spec.name]) for spec in specs)))
    except ExportError:
        raise
    except Exception as error:  # the user's own code: any error may come
        shapes = _shapes(feed)
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        line = line_of(error, user_files)
        name, where = type(module).__name__, f": {line}" if line else ""
        batch = batch_dim(specs)
        if ran is not None and batch is not None and _shapes(ran) != shapes:
            fixed, remedy = fixed_reason([batch])
            raise ExportError(
                f"{name} cannot be exported{where}: {fixed}: it runs {_shapes(ran)}, and not {shapes}: {reason}\n{remedy}"
            ) from error
        raise ExportError(
            f"{name} cannot run {shapes}{where}: {reason}\nsay what it takes with --input NAME=1x3x224x224[:dtype]"
        ) from error
    return {name: tensor.numpy() for name, tensor in results.items()}


def _shapes(feed: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in feed.items())


def _image_cases(artifact: Artifact, module: torch.nn.Module, folder: Path, user_files: Sequence[str]) -> Iterator[_Case]:
    names = [spec.name for spec in artifact.manifest.outputs]
    for feed in image_feeds(artifact, folder, batch_size=_REAL_IMAGES, count=_REAL_IMAGES):
        results = _eager(module, artifact.manifest.inputs, feed, user_files)
        case = _Case("images", feed, dict(zip(names, results.values(), strict=True)))
        _finite(case, fatal=True)
        yield case


def _finite(case: _Case, *, fatal: bool) -> bool:
    """Whether the eager outputs are finite; where not and it is `fatal`, ExportError naming the output."""
    broken = [name for name, array in case.expected.items() if not np.isfinite(array).all()]
    if broken and fatal:
        raise ExportError(
            f"the eager module itself gives NaN or infinity in output {broken[0]!r} on {case.data} input: parity cannot be checked"
            "\ncheck the weights; if the model needs real input, give some with --data IMAGEFOLDER"
        )
    return not broken


def _parity(session: Session, seen: Sequence[_Case], tolerance: Tolerance) -> Parity:
    cases = [
        compare(
            session.run(case.feed),
            case.expected,
            tolerance,
            data=case.data,
            batch=len(next(iter(case.feed.values()))),
            what=session.name,
        )
        for case in seen
    ]
    return Parity(against="eager", by=f"onnxruntime {ONNXRUNTIME_VERSION}", tolerance=tolerance, cases=cases)
