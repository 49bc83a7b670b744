"""The stage `export`: a trained state_dict to an ONNX artifact, compared with the eager module."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from deploy.artifact import FORMAT, ONNX, WEIGHTS, Artifact, Manifest, Source, Stage, file_digest, request_digest, standing
from deploy.errors import ExportError, UsageError
from deploy.exporter import export_graph, flatten_outputs
from deploy.factory import BuiltModel, build_model
from deploy.feeds import image_feeds
from deploy.onnxfile import check_onnx, model_specs, open_onnx, save_model
from deploy.parity import PARITY_BATCHES, TOLERANCES, Parity, Tolerance, compare
from deploy.pipeline.lineage import data_digest, random_feeds, tool_versions
from deploy.precision.cpu import ONNXRUNTIME_VERSION
from deploy.preprocess import Preprocess
from deploy.progress import Progress, silent
from deploy.runtime.session import Session, SessionOptions, open_session
from deploy.tensors import DTYPES, EXAMPLE_BATCH, TensorSpec, batch_dim, default_profile, example_dims, parse_shape
from deploy.weights import Match, save_weights
from deploy.writer import ArtifactWriter, check_output

logger = logging.getLogger(__name__)

BATCH = "batch"
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
    specs = _input_specs(options, built)
    default = built.preprocess if _is_image(specs) else None  # another input than the architecture's own may have been given
    preprocess = _preprocess(options.preprocess or default, specs)
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
    feeds = random_feeds(specs, example_dims(specs, batch_dim(specs)))
    expected = [_eager(built.module, specs, feed) for feed in feeds]
    outputs = _output_names(options, built, list(expected[0]))
    seen = [
        _Case("random", feed, dict(zip(outputs, results.values(), strict=True)))
        for feed, results in zip(feeds, expected, strict=True)
    ]
    if not all(_finite(case, fatal=options.data is None) for case in seen):
        seen = []
        logger.warning("the eager module gives NaN or infinity on random input: parity is checked on images alone")
    progress("exporting to ONNX")
    example = {name: torch.from_numpy(array) for name, array in feeds[PARITY_BATCHES.index(EXAMPLE_BATCH)].items()}
    graph = export_graph(
        built.module, specs, example, outputs, opset=options.opset, user_files=[file.path for file in built.source_files]
    )
    with ArtifactWriter(out) as writer:
        save_model(graph.model, writer.path / ONNX)
        check_onnx(writer.path / ONNX)
        save_weights(built.module, writer.path / WEIGHTS)
        inputs, found = model_specs(graph.model)
        _check_classes(classes, found)
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
            seen += _image_cases(written, built.module, options.data)
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
    _check_classes(names, bare.manifest.outputs)
    with ArtifactWriter(out) as writer:
        for file in bare.manifest.files:
            shutil.copyfile(path.parent / file, writer.path / (ONNX if file == path.name else file))
        return writer.commit(
            msgspec.structs.replace(
                bare.manifest,
                name=name or out.resolve().name,
                files={},
                preprocess=_preprocess(preprocess, bare.manifest.inputs),
                classes=names,
                tools=tool_versions(),
            )
        )


def read_classes(path: Path) -> list[str]:
    """Class names, one a line. Raises UsageError when the file is missing, empty or names a class twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the class names of {path}: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        raise UsageError(f"{path} must hold one class name a line, and no empty line between them")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path} names {twice[0]!r} twice")
    return names


def _tolerance(options: ExportOptions) -> Tolerance:
    default = TOLERANCES["fp32"]
    return Tolerance(
        rtol=default.rtol if options.rtol is None else options.rtol,
        atol=default.atol if options.atol is None else options.atol,
    )


def _input_specs(options: ExportOptions, built: BuiltModel) -> tuple[TensorSpec, ...]:
    """Specs of the inputs: those of the options, else the architecture's own; the leading 1 made symbolic."""
    if not options.inputs and built.inputs is None:
        raise UsageError(f"say what {built.factory} takes: --input NAME=1x3x224x224[:dtype], once for each input")
    if options.inputs and built.inputs is not None and len(options.inputs) != len(built.inputs):
        raise UsageError(
            f"{built.factory} takes {len(built.inputs)} inputs ({', '.join(map(str, built.inputs))}), not {len(options.inputs)}"
        )
    specs = tuple(parse_input(text) for text in options.inputs) or built.inputs or ()
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(f"two inputs have the same name: {', '.join(names)}")
    if options.static_batch:
        return specs
    return tuple(dataclasses.replace(spec, shape=(BATCH, *spec.shape[1:])) if spec.shape[:1] == (1,) else spec for spec in specs)


def parse_input(text: str) -> TensorSpec:
    """`"image=1x3x224x224:float32"` -> the spec; float32 when no dtype is given. Raises UsageError."""
    name, equals, rest = text.partition("=")
    shape, colon, dtype = rest.partition(":")
    if not equals or not name or not shape or (colon and dtype not in DTYPES):
        raise UsageError(f"cannot read the input {text!r}; expected NAME=1x3x224x224[:dtype], dtype one of {', '.join(DTYPES)}")
    return TensorSpec(name=name, dtype=dtype or "float32", shape=parse_shape(shape))


def _output_names(options: ExportOptions, built: BuiltModel, found: Sequence[str]) -> list[str]:
    names = list(options.outputs or built.outputs or found)
    taken = [text.partition("=")[0] for text in options.inputs] or [spec.name for spec in built.inputs or ()]
    if twice := [name for name in names if names.count(name) + taken.count(name) > 1]:
        raise UsageError(f"the name {twice[0]!r} is given to two inputs or outputs")
    if len(names) != len(found):
        raise UsageError(f"{built.factory} has {len(found)} outputs, and {len(names)} names were given: {', '.join(names)}")
    return names


def _is_image(inputs: Sequence[TensorSpec]) -> bool:
    return len(inputs) == 1 and len(inputs[0].shape) == 4


def _preprocess(spec: str | Preprocess | None, inputs: Sequence[TensorSpec]) -> Preprocess | None:
    if spec is None or isinstance(spec, Preprocess):
        return spec
    if not _is_image(inputs):
        raise UsageError(f"--preprocess is for models with one image input; this one takes {', '.join(map(str, inputs))}")
    height, width = inputs[0].shape[2:] if inputs[0].shape[1] in (1, 3) else inputs[0].shape[1:3]
    return Preprocess.load(spec, (height, width) if isinstance(height, int) and isinstance(width, int) else None)


def _check_classes(classes: Sequence[str] | None, outputs: Sequence[TensorSpec]) -> None:
    last = outputs[0].shape[-1] if len(outputs) == 1 and len(outputs[0].shape) == 2 else None
    if classes is not None and isinstance(last, int) and last != len(classes):
        raise UsageError(f"--classes has {len(classes)} names, and the model gives {last} scores ({outputs[0]})")


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


def _eager(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The eager module's outputs, flattened. Raises ExportError, with the module's own error, when it cannot run the input."""
    try:
        with torch.inference_mode():
            results = flatten_outputs(module(*(torch.from_numpy(feed[spec.name]) for spec in specs)))
    except ExportError:
        raise
    except Exception as error:  # the user's own code: any error may come
        shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise ExportError(
            f"{type(module).__name__} cannot run {shapes}: {reason}\nsay what it takes with --input NAME=1x3x224x224[:dtype]"
        ) from error
    return {name: tensor.numpy() for name, tensor in results.items()}


def _image_cases(artifact: Artifact, module: torch.nn.Module, folder: Path) -> Iterator[_Case]:
    names = [spec.name for spec in artifact.manifest.outputs]
    for feed in image_feeds(artifact, folder, batch_size=_REAL_IMAGES, count=_REAL_IMAGES):
        results = _eager(module, artifact.manifest.inputs, feed)
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
