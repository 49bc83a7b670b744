"""The stage `export`: a trained state_dict to an ONNX artifact, compared with the eager module."""

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Decode
from deploy.artifact.find import BUILD
from deploy.artifact.manifest import FORMAT, ONNX, WEIGHTS, Manifest, Precision, Source, Stage
from deploy.artifact.onnxfile import check_onnx, model_precision, model_specs, save_model
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import EXAMPLE_BATCH, Feed, TensorSpec, batch_dim, default_profile, example_dims, random_feeds
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import calibration_set
from deploy.data.evidence_feeds import NamedFeed, folder_digest, kind_of, odd_cut
from deploy.data.npz_folder import holds_npz
from deploy.errors import ArtifactError, DataError, ExportError, OutputError, UsageError
from deploy.evaluation.gate import Expected, check_expected
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import PARITY_BATCHES
from deploy.host.versions import tool_versions
from deploy.intake.build import BuiltModel, build_model
from deploy.intake.checkpoint import weights_digest
from deploy.intake.exporter import export_graph
from deploy.intake.model_args import parse_model_args
from deploy.intake.options import Match
from deploy.intake.weightsfile import save_weights
from deploy.options import collect
from deploy.pipeline.export_advice import repeated
from deploy.pipeline.export_interface import (
    check_classes,
    check_decode,
    copy_decode,
    copy_functions,
    default_preprocess,
    image_fields,
    input_specs,
    load_preprocesses,
    output_names,
    read_classes,
    try_decode,
    upright,
)
from deploy.pipeline.export_onnx import export_onnx_file
from deploy.pipeline.export_options import ExportOptions
from deploy.pipeline.export_parity import REAL_ROWS, bounded, check_repeatable, finite, other_size, run_eager, with_bounds
from deploy.pipeline.stage import PathLike, run_stage
from deploy.pipeline.written import Case, prove
from deploy.progress import Progress, silent

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
    exif_orientation: bool = False,
    decode: str | None = None,
    classes: PathLike | None = None,
    data: PathLike | None = None,
    eval_folder: PathLike | None = None,
    expect_top1: float | None = None,
    opset: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    min_cosine: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Export a trained state_dict to the ONNX artifact `out` (default `build/<name>`), checked against eager.

    What the options mean: `deploy.pipeline.export_options.ExportOptions`. `onnx` makes an artifact of a bare ONNX file
    instead, with `inputs`, `preprocess`, `exif_orientation`, `decode`, `classes`, `data`, `eval_folder`, `expect_top1` and `name` only. Raises a DeployError; nothing
    that stood at `out` is lost then.
    """
    given = dict(locals())
    given["model_args"] = model_args if isinstance(model_args, Mapping) else parse_model_args(model_args)
    options = collect(ExportOptions, given)
    limits = collect(ToleranceOptions, given)
    limits.tolerance("fp32")  # raises now what makes no sense
    if options.onnx is not None:
        if limits != ToleranceOptions():
            raise UsageError(
                "`onnx` takes the graph as it is: there is nothing to compare it with; leave out the limits of parity"
            )
        target = Path(out) if out is not None else _default_out(name or options.onnx.stem, "a bare ONNX file", keep_bare=False)
        return export_onnx_file(options, target, expected=_expected(options), progress=progress)
    default = name or (arch or model or "").rpartition(":")[2].lower()
    if out is not None:
        target = Path(out)
    else:
        target = BUILD / default if weights is not None else _default_out(default, "random weights")
    return export_artifact(target, options, limits, progress)


def export_artifact(
    out: Path, options: ExportOptions, limits: ToleranceOptions | None = None, progress: Progress = silent
) -> Artifact:
    """Export to the artifact `out`; what was loaded and what was not is logged.

    Raises CheckpointError, FactoryError, ExportError, ParityError, OutputError, DataError, UsageError and BackendError
    (ONNX Runtime, which parity is checked on, is not installed). `out` is then as it was.
    """
    return run_stage(_Export(options, limits or ToleranceOptions(), progress), out)


class _Export:
    name = "export"

    def __init__(self, options: ExportOptions, limits: ToleranceOptions, progress: Progress) -> None:
        self._options = options
        self._limits = limits
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
            real_images = options.data is not None and not holds_npz(options.data)
            self._preprocesses = load_preprocesses(options.preprocess, self._specs, probe=not real_images)
        else:
            own = default_preprocess(self._built, self._specs)
            self._preprocesses = {} if own is None else {self._specs[0].name: own}
        if options.exif_orientation:
            self._preprocesses = upright(self._preprocesses)
        self._expected = _expected(options)
        self._classes = read_classes(options.classes) if options.classes else None
        self._decode = Decode.load(options.decode) if options.decode else None
        request = {
            **_request(options, self._built, self._specs, self._preprocesses, self._classes),
            "decode": None if self._decode is None else self._decode.to_json(),
            "limits": vars(self._limits),
        }
        if self._expected is not None:
            described = Artifact(
                Path("the export"), self._manifest(list(self._specs), [], Path("export"), Stage(name=self.name, request=""))
            )
            request["eval"] = self._expected.request(described)  # raises now what makes no sense
        return request

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        options, module, progress = self._options, self._built.module, self._progress
        if self._report is None:
            logger.warning("no `weights`: the weights of %s are random", self._built.factory)
        else:
            logger.log(logging.INFO if self._report.complete else logging.WARNING, "%s", self._report.summary())
        progress("running the eager module")
        dims = example_dims(self._specs, batch_dim(self._specs))
        self._specs = bounded(self._specs, module, dims, self._preprocesses)
        copy_functions(self._preprocesses, options.preprocess, self._specs, writer.path)
        copy_decode(self._decode, options.decode, writer.path)
        outputs, cases, feed = self._eager_cases(random_feeds(self._specs, dims), self._real_feeds(writer.path, stage))
        if cases:
            try_decode(self._decode, self._classes, cases[-1].expected, writer.path)
        progress("exporting to ONNX")
        example = {name: torch.from_numpy(array) for name, array in feed.items()}
        files = [file.path for file in self._built.source_files]
        graph = export_graph(module, self._specs, example, outputs, opset=options.opset, user_files=files)
        save_model(graph, writer.path / ONNX)
        check_onnx(writer.path / ONNX)
        save_weights(module, writer.path / WEIGHTS)
        inputs, results = model_specs(graph)
        precision = model_precision(graph)
        del graph  # its weights are as large as the file
        check_decode(self._decode, self._classes, results)
        written = writer.describe(self._manifest(with_bounds(inputs, self._specs), results, writer.out, stage, precision))
        if self._expected is not None:
            self._expected.check(written)
        parity = prove(
            written,
            cases,
            self._limits.tolerance(precision),
            against="eager",
            remedy="another `opset` may help; looser limits: `rtol`, `atol`",
            progress=progress,
        )
        if parity.constant:
            logger.warning(
                "output %s is the same number everywhere: that the file agrees with eager proves nothing of it",
                parity.constant[0],
            )
        if parity.tiny:
            logger.warning(
                "output %s is nowhere above `atol`, %g, and off by more than `rtol`: that the file agrees with eager proves nothing"
                " of it; a smaller `atol` asks for more",
                parity.tiny[0],
                parity.tolerance.atol,
            )
        source = msgspec.structs.replace(written.manifest.source, state_dict=written.manifest.files[WEIGHTS].sha256)
        accuracy = None if self._expected is None else check_expected(written, self._expected, progress)
        return msgspec.structs.replace(written.manifest, source=source, parity=parity, accuracy=accuracy)

    def _real_feeds(self, folder: Path, stage: Stage) -> list[NamedFeed]:
        """The first rows of `data`. The file of a user's function is in `folder`."""
        if self._options.data is None:
            return []
        described = Artifact(folder, self._manifest(list(self._specs), [], folder, stage))
        data = calibration_set(described, self._options.data, most=REAL_ROWS)
        feeds = [NamedFeed(kind_of(data), feed) for feed in islice(data.feeds(REAL_ROWS), REAL_ROWS)]
        if not feeds:
            raise DataError("there is no real input in `data`: at least one image or feed is needed")
        return feeds

    def _eager_cases(self, made_up: list[Feed], real: list[NamedFeed]) -> tuple[list[str], list[Case], Feed]:
        """The names of the outputs, what the eager module makes of the feeds and of other sizes, and the feed to export with.

        No cases of made-up feeds where it does not run them, or the results are not finite, and there are real ones.
        """
        module, specs = self._built.module, self._specs
        files = [file.path for file in self._built.source_files]
        example = made_up[PARITY_BATCHES.index(EXAMPLE_BATCH)]
        try:
            first = run_eager(module, specs, made_up[0], files)
            results = [first, *(run_eager(module, specs, feed, files, ran=made_up[0]) for feed in made_up[1:])]
        except ExportError:
            if not real:
                raise
            made_up, results = [], []
            example = repeated(specs, real[0].feed, EXAMPLE_BATCH)
            real = [*real, *(NamedFeed(real[0].data, cut, maybe=True) for cut in odd_cut(specs, real[0].feed))]
            first = run_eager(module, specs, example, files)
        names = output_names(self._options.outputs, self._built, specs, list(first))
        check_classes(self._classes, [array.shape for array in first.values()])
        check_repeatable(module, specs, made_up[0] if made_up else example, first, files)
        cases = [_case("random", feed, names, arrays) for feed, arrays in zip(made_up, results, strict=True)]
        if not all(finite(case, fatal=not real) for case in cases):
            cases = []
        if real and not cases:
            logger.warning("the eager module does not run made-up input, or gives NaN: parity is checked on real input alone")
        if cases:
            cases += self._other_sizes(names, files)
        for data, feed, maybe, _ in real:
            try:
                case = _case(data, feed, names, run_eager(module, specs, feed, files))
            except ExportError:
                if maybe:
                    continue  # a size that nobody gave
                raise
            if finite(case, fatal=not maybe):
                cases.append(case)
        return names, cases, example

    def _other_sizes(self, names: list[str], files: list[str]) -> list[Case]:
        module = self._built.module
        case, sizes = other_size(module, self._specs, names, files)
        if sizes:
            logger.warning(
                "%s runs with %s, and neither with odd sizes nor with 32 more: it is compared at these sizes alone",
                type(module).__name__,
                sizes,
            )
        return [case] if case is not None and finite(case, fatal=False) else []

    def _manifest(
        self, inputs: list[TensorSpec], outputs: list[TensorSpec], out: Path, stage: Stage, precision: Precision = "fp32"
    ) -> Manifest:
        options, built = self._options, self._built
        profile = default_profile(inputs)
        return Manifest(
            format=FORMAT,
            kind="onnx",
            name=options.name or out.resolve().name,
            precision=precision,
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
            **image_fields(self._preprocesses, inputs),
            decode=self._decode,
            classes=self._classes,
            parity=None,
            accuracy=None,
            calibration=None,
            exclusions=[],
            tools=tool_versions(),
            stage=stage,
            created="",
        )


def _case(data: str, feed: Feed, names: Sequence[str], results: Feed) -> Case:
    return Case(data, feed, dict(zip(names, results.values(), strict=True)))


def _request(
    options: ExportOptions,
    built: BuiltModel,
    specs: Sequence[TensorSpec],
    preprocesses: Mapping[str, Preprocess],
    classes: list[str] | None,
) -> dict[str, Any]:
    """Everything that the artifact depends on, as JSON-like values; where the user's files lie is part of the manifest."""
    return {
        "factory": built.factory,
        "args": dict(built.args),
        "files": [[file.path, file.sha256] for file in built.source_files],
        "folder": built.folder,
        "weights": weights_digest(options.weights) if options.weights else None,
        "match": options.match,
        "allow_partial": options.allow_partial,
        "inputs": [[str(spec), spec.bounds] for spec in specs],
        "outputs": list(options.outputs),
        "preprocess": [[name, preprocess.to_json()] for name, preprocess in preprocesses.items()],
        "classes": classes,
        "opset": options.opset,
        "name": options.name,
        "data": folder_digest(options.data, REAL_ROWS, table=len(specs) > 1) if options.data else None,
        "tools": tool_versions(),
    }


def _expected(options: ExportOptions) -> Expected | None:
    return None if options.eval_folder is None else Expected(folder=options.eval_folder, top1=options.expect_top1)


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
