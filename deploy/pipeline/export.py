"""The stage `export`: a trained state_dict to an ONNX artifact, compared with the eager module."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import BUILD
from deploy.artifact.manifest import FORMAT, ONNX, WEIGHTS, Manifest, Source, Stage, file_digest
from deploy.artifact.onnxfile import check_onnx, model_specs, open_onnx, save_model
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import EXAMPLE_BATCH, Feed, TensorSpec, batch_dim, default_profile, example_dims, random_feeds
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.image_folder import data_digest
from deploy.errors import ArtifactError, OutputError
from deploy.evidence.parity import PARITY_BATCHES
from deploy.host.versions import tool_versions
from deploy.intake.build import BuiltModel, build_model
from deploy.intake.exporter import export_graph
from deploy.intake.model_args import parse_model_args
from deploy.intake.options import Match
from deploy.intake.weightsfile import save_weights
from deploy.options import collect
from deploy.pipeline.export_interface import (
    check_classes,
    default_preprocess,
    input_specs,
    load_preprocess,
    output_names,
    read_classes,
)
from deploy.pipeline.export_options import ExportOptions
from deploy.pipeline.export_parity import REAL_IMAGES, Case, check_parity, finite, image_cases, run_eager
from deploy.pipeline.stage import PathLike, run_stage
from deploy.progress import Progress, silent
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions

logger = logging.getLogger(__name__)


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

    What the options mean: `deploy.pipeline.export_options.ExportOptions`. `onnx` makes an artifact of a bare ONNX file
    instead, with `preprocess`, `classes` and `name` only. Raises a DeployError; nothing that stood at `out` is lost then.
    """
    given = dict(locals())
    given["model_args"] = model_args if isinstance(model_args, Mapping) else parse_model_args(model_args)
    options = collect(ExportOptions, given)
    if options.onnx is not None:
        target = Path(out) if out is not None else _default_out(name or options.onnx.stem, "a bare ONNX file", keep_bare=False)
        return export_onnx_file(options.onnx, target, preprocess=preprocess, classes=options.classes, name=name)
    default = name or (arch or model or "").rpartition(":")[2].lower()
    if out is not None:
        target = Path(out)
    else:
        target = BUILD / default if weights is not None else _default_out(default, "random weights")
    return export_artifact(target, options, progress)


def export_artifact(out: Path, options: ExportOptions, progress: Progress = silent) -> Artifact:
    """Export to the artifact `out`; what was loaded and what was not is logged.

    Raises CheckpointError, FactoryError, ExportError, ParityError, OutputError, DataError, UsageError and BackendError
    (ONNX Runtime, which parity is checked on, is not installed). `out` is then as it was.
    """
    return run_stage(_Export(options, progress), out)


class _Export:
    name = "export"

    def __init__(self, options: ExportOptions, progress: Progress) -> None:
        self._options = options
        self._progress = progress

    def request(self) -> dict[str, Any]:
        options = self._options
        self._progress("building the module")
        self._built, self._report = build_model(
            arch=options.arch,
            model=options.model,
            args=options.model_args,
            num_classes=options.num_classes,
            weights=options.weights,
            match=options.match,
            allow_partial=options.allow_partial,
        )
        self._specs = input_specs(options.inputs, self._built, static_batch=options.static_batch)
        if options.preprocess:
            self._preprocess = load_preprocess(options.preprocess, self._specs)
        else:
            self._preprocess = default_preprocess(self._built, self._specs)
        self._classes = read_classes(options.classes) if options.classes else None
        return _request(options, self._built, self._specs, self._preprocess, self._classes)

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        options, module, progress = self._options, self._built.module, self._progress
        if self._report is None:
            logger.warning("no `weights`: the weights of %s are random", self._built.factory)
        else:
            logger.log(logging.INFO if self._report.complete else logging.WARNING, "%s", self._report.summary())
        progress("running the eager module")
        feeds = random_feeds(self._specs, example_dims(self._specs, batch_dim(self._specs)))
        outputs, cases = self._eager_cases(feeds)
        progress("exporting to ONNX")
        example = {name: torch.from_numpy(array) for name, array in feeds[PARITY_BATCHES.index(EXAMPLE_BATCH)].items()}
        files = [file.path for file in self._built.source_files]
        graph = export_graph(module, self._specs, example, outputs, opset=options.opset, user_files=files)
        save_model(graph, writer.path / ONNX)
        check_onnx(writer.path / ONNX)
        save_weights(module, writer.path / WEIGHTS)
        written = writer.describe(self._manifest(*model_specs(graph), writer.out, stage))
        progress("comparing with eager")
        if options.data is not None:
            cases += image_cases(written, module, options.data, files)
        with open_session(written, "onnxruntime", SessionOptions(device="cpu")) as session:
            parity = check_parity(session, cases, options.tolerance())
        source = msgspec.structs.replace(written.manifest.source, state_dict=written.manifest.files[WEIGHTS].sha256)
        return msgspec.structs.replace(written.manifest, source=source, parity=parity)

    def _eager_cases(self, feeds: list[Feed]) -> tuple[list[str], list[Case]]:
        """The names of the outputs, and what the eager module makes of each feed; no cases where that is not finite."""
        module, specs = self._built.module, self._specs
        files = [file.path for file in self._built.source_files]
        first = run_eager(module, specs, feeds[0], files)
        names = output_names(self._options.outputs, self._built, specs, list(first))
        check_classes(self._classes, [array.shape for array in first.values()])
        results = [first, *(run_eager(module, specs, feed, files, ran=feeds[0]) for feed in feeds[1:])]
        cases = [
            Case("random", feed, dict(zip(names, arrays.values(), strict=True)))
            for feed, arrays in zip(feeds, results, strict=True)
        ]
        if not all(finite(case, fatal=self._options.data is None) for case in cases):
            logger.warning("the eager module gives NaN or infinity on random input: parity is checked on images alone")
            return names, []
        return names, cases

    def _manifest(self, inputs: list[TensorSpec], outputs: list[TensorSpec], out: Path, stage: Stage) -> Manifest:
        options, built = self._options, self._built
        profile = default_profile(inputs)
        return Manifest(
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
            outputs=outputs,
            profiles=[profile] if profile else [],
            preprocess=self._preprocess,
            classes=self._classes,
            parity=None,
            accuracy=None,
            calibration=None,
            exclusions=[],
            tools=tool_versions(),
            stage=stage,
            created="",
        )


def _request(
    options: ExportOptions,
    built: BuiltModel,
    specs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    classes: list[str] | None,
) -> dict[str, Any]:
    """Everything that the artifact depends on, as JSON-like values; where the user's files lie is part of the manifest."""
    return {
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
            " name another `out` or `name`, or delete it"
        )
    return out
