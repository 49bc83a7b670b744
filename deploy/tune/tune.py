"""`deploy.tune`: the fastest mix of INT8 and floating point inside an accuracy budget, certified."""

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact, parent_record
from deploy.artifact.manifest import ONNX, WEIGHTS, Accuracy, Manifest, Stage
from deploy.artifact.onnxfile import load_model, save_model
from deploy.artifact.summary import accuracy_text
from deploy.artifact.tensors import Feed, row_count
from deploy.artifact.tuning import Stopped, Tuning
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.evidence_feeds import first_rows
from deploy.errors import AccuracyError, BackendError, DataError, UsageError
from deploy.evaluation.annotated import labelled
from deploy.evaluation.gate import Reference, verdict_of
from deploy.evaluation.options import IGNORE
from deploy.host.cpu import cpu_model, has_vnni, usable_cores
from deploy.options import collect
from deploy.pipeline.stage import PathLike, check_fp32, default_out, descendant, open_source, run_stage
from deploy.precision.int8.options import QuantizeOptions, quantize_request
from deploy.precision.int8.quantize import CalibratedGraph, calibrate_onnx
from deploy.progress import Progress, silent
from deploy.runtime.catalog import AUTO, BACKENDS, CPU_FORMS, split_backend
from deploy.runtime.load import import_backend
from deploy.runtime.session import SessionOptions
from deploy.tune import options as tune_options
from deploy.tune.certify import Choice, certify, check_budget, choose
from deploy.tune.damage import Kind
from deploy.tune.journal import Journal
from deploy.tune.measure import BASE, ROWS, Mixes, OnnxMixes, Place, Stopwatch
from deploy.tune.options import TuneOptions
from deploy.tune.search import Built, Clock, Weighed, build_points, prove, time_points, weigh

if TYPE_CHECKING:
    from deploy.tune.engines import EngineSetting

logger = logging.getLogger(__name__)

KEEP_BELOW = 0.0
"""A layer whose noise is larger than its signal, in dB, stays in floating point; of all others the damage at the outputs decides."""


def tune(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]],
    eval_folder: PathLike,
    images: int | None = None,
    method: str | None = None,
    batch_size: int = 2,
    per_tensor: bool = False,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    float_first: bool = False,
    float_last: bool = False,
    bias_correction: bool = True,
    equalize: bool | None = None,
    metric: str = "top1",
    ignore_index: int = IGNORE,
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    min_cosine: float | None = None,
    backend: str = "auto",
    shapes: Sequence[str] = (),
    fp8: bool = False,
    batch: int | None = None,
    minutes: float = 10.0,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> Artifact:
    """The fastest mix of INT8 and floating point of an FP32 ONNX artifact that keeps within `max_drop`; `out` is `build/<name>-tuned` by default.

    On `tensorrt` and `tensorrt-rtx` it is an engine of INT8, or FP8, and FP16.

    calib to equalize: as of `quantize`. eval_folder, metric, ignore_index, max_drop: as of `quantize`, and the loss must be shown to be
    within the limit by its 95 % interval. backend, device, threads, batch: where and how the artifact is to run. shapes: as of `build_trt`. minutes: for the search;
    what was measured is kept, and the same call goes on.

    Where no mix passes and is faster, the result is the artifact in floating point, or an engine in FP16. The manifest's `tuning` says what was found, and why.
    Raises a DeployError; nothing that stood at `out` is lost then. Ctrl-C during the tests leaves the best of what has passed; else it is raised.
    """
    given = dict(locals())
    options = collect(TuneOptions, given)
    session = SessionOptions(device=device, threads=threads)
    source = open_source(artifact)
    check_fp32(source)
    data = calibration_set(source, calib, images)
    if isinstance(calib, (str, Path)) and Path(calib).resolve() == Path(eval_folder).resolve():
        logger.warning(
            "%s calibrates and judges: what is shown on images that were calibrated on need not hold for others", calib
        )
    quantizing = collect(QuantizeOptions, given, min_share=0.0, keep_below=KEEP_BELOW, fp16=options.runs_engines)
    stage = TuneStage(source, data, options, quantizing, session, progress)
    return run_stage(stage, default_out(out, source, "tuned"), source)


class TuneStage:
    """See `tune`."""

    name = "tune"

    def __init__(
        self,
        source: Artifact,
        data: CalibrationSet,
        options: TuneOptions,
        quantizing: QuantizeOptions,
        session: SessionOptions,
        progress: Progress,
    ) -> None:
        self._source = source
        self._data = data
        self._options = options
        self._quantizing = quantizing
        self._progress = progress
        self._backend = _backend(options.backend)
        self._engines = _engines(source, self._backend, session.device, options)
        profiles = self._engines.profiles if self._engines else ()
        self._place = Place.of(source, self._backend, session, options.batch, profiles, quantizing.precision)
        self._gate = options.gate(None if self._engines else self._backend)
        self._measuring: dict[str, Any] | None = None
        self._judging: dict[str, Any] = {}

    def request(self) -> dict[str, Any] | None:
        self._check_labels()
        check_budget(self._source, self._gate)
        self._source.verify(weights=False)
        self._judging = self._gate.request(self._source)
        request = quantize_request(self._source, self._data, self._quantizing)
        if request is None:
            if self._engines is not None:
                raise UsageError(
                    "engines are converted and compared on `calib` after the calibration: give what can be read again"
                )
            return None
        place = self._place
        where = {"backend": place.backend, "version": _version(place.backend), "cpu": cpu_model(), "cores": usable_cores()}
        sizes = {"dims": dict(place.dims), "threads": place.options.threads, "device": place.options.device}
        if self._engines is not None:
            where |= {"gpu": self._engines.gpu, "profiles": msgspec.to_builtins(self._engines.profiles)}
            where["rows"] = self._engines.rows_at_a_time(self._source, self._quantizing.batch_size)
        self._measuring = {**request, **where, **sizes, "kind": self._kind}
        return {**self._measuring, "gate": self._judging, "minutes": self._options.minutes}

    def _check_labels(self) -> None:
        """Raise DataError and UsageError where the data has not what the metric takes."""
        try:
            self._gate.check(self._source)
        except DataError as error:
            try:
                labelled(self._source, self._gate.folder, None).check()
            except (DataError, UsageError):
                raise error from None
            raise DataError(f"{error}; or take `metric` sqnr or cosine, which need no labels") from error

    @property
    def _kind(self) -> Kind:
        return "kl" if self._options.metric in ("top1", "top5") else "relative"

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        source, progress = self._source, self._progress
        clock = Clock(self._options.minutes)
        reference = Reference(source, self._gate, progress)  # first: a metric that fails is to be known before the work
        graph = calibrate_onnx(source, self._data, self._quantizing, progress)
        feeds = self._feeds() if self._measuring is not None else graph.feeds
        journal = Journal(self._measuring)
        with tempfile.TemporaryDirectory(prefix="deploy-tune-") as temporary:
            folder = Path(temporary)
            made = self._mixes(graph, feeds, folder)
            with Stopwatch(self._place, {BASE: made.base}) as watch:
                try:
                    weighed = weigh(made, watch, journal, clock, progress)
                except KeyboardInterrupt:
                    logger.warning("what has been measured is kept: the same command goes on")
                    raise
                points, p50_ms = time_points(watch, build_points(made, weighed, progress), progress)
            data = {"gate": self._judging, "place": self._measuring}
            while True:  # until the result has its evidence; what has none is left out, and what it was faster than is tested
                points, accuracies, stopped = certify(points, reference, self._backend, data, journal, clock, progress)
                choice = choose([each.point for each in points], self._gate)
                place = next((index for index, each in enumerate(points) if each.point.name == choice.name), None)
                if place is None:
                    built = None
                    break
                try:
                    points[place] = prove(points[place], made, weighed)
                except KeyboardInterrupt:
                    logger.warning("what has been measured and tested is kept: the same command goes on")
                    raise
                if (built := points[place].artifact) is not None:
                    break
            accuracy = accuracies.get(choice.name)
            if built is None and self._engines is not None:
                built, accuracy, choice = self._half(made, reference, choice)
            tuning = self._tuning(choice, weighed, points, p50_ms, sum(map(row_count, feeds)), stopped)
            if tuning.stopped is not None:
                stage = msgspec.structs.replace(stage, request=secrets.token_hex(32))  # the next call goes on
            if built is None:
                return self._floating_point(writer, stage, tuning)
            return _delivered(source, built, writer, stage, accuracy, tuning)

    def _half(self, made: Mixes, reference: Reference, choice: Choice) -> tuple[Artifact, Accuracy, Choice]:
        """The engine in FP16 as the result, with what it loses, which is not part of the test of mixes.

        Raises AccuracyError where that is more than the limit.
        """
        accuracy = reference.compared(made.base, self._backend)
        verdict, said = verdict_of(accuracy), accuracy_text(accuracy)
        if verdict == "outside":
            raise AccuracyError(f"{choice.because}, and neither does FP16 keep within the limit: {said}. Nothing was written")
        shown = "keeps" if verdict == "inside" else "is not shown to keep"
        return made.base, accuracy, choice._replace(because=f"{choice.because}; FP16 {shown} within the limit: {said}")

    def _feeds(self) -> list[Feed]:
        """The rows that damage is measured on."""
        if self._engines is None:
            return first_rows(self._data, self._quantizing.batch_size, ROWS)
        return self._engines.feeds(self._source, self._data, self._quantizing.batch_size)

    def _mixes(self, graph: CalibratedGraph, feeds: list[Feed], folder: Path) -> Mixes:
        given = self._source, self._data, graph, self._place, feeds, self._kind, folder, self._progress
        if self._engines is None:
            return OnnxMixes(*given)
        from deploy.tune.engines import EngineMixes

        return EngineMixes(*given, self._engines)

    def _tuning(
        self, choice: Choice, weighed: Weighed, points: Sequence[Built], p50_ms: float, rows: int, stopped: Stopped | None
    ) -> Tuning:
        chosen = next((each.point.int8 for each in points if each.point.name == choice.name), [])
        gate = self._gate
        units = {"top1": "%", "top5": "%", "miou": "%", "map": "%", "sqnr": "dB"}
        return Tuning(
            result=self._place.floats if choice.name == BASE else choice.name,
            floats=self._place.floats,
            codes=self._place.codes,
            because=choice.because,
            backend=self._backend,
            cpu=cpu_model(),
            gpu=self._engines.gpu[0] if self._engines else None,
            threads=self._place.options.threads or usable_cores(),
            batch=self._place.batch,
            metric=gate.metric.metric,
            limit=gate.limit,
            unit=units.get(gate.metric.metric, ""),
            rows=rows,
            kind=self._kind,
            p50_ms=p50_ms,
            crossing=(weighed.costs.per_tensor, weighed.costs.per_thousand),
            units=weighed.records(chosen),
            points=[each.point for each in points],
            stopped=stopped or (None if weighed.complete else "minutes"),
        )

    def _floating_point(self, writer: ArtifactWriter, stage: Stage, tuning: Tuning) -> Manifest:
        """The source as it is, under the name of the result."""
        source = self._source
        if source.bare is not None:
            save_model(load_model(source.onnx_path), writer.path / ONNX)
        else:
            kept = {WEIGHTS, *(function.file for function in source.manifest.functions)}
            _copy(source, writer.path, [name for name in source.manifest.files if name not in kept])
        return descendant(source, writer.out, stage, tuning=tuning)


def _delivered(
    source: Artifact, built: Artifact, writer: ArtifactWriter, stage: Stage, accuracy: Accuracy | None, tuning: Tuning
) -> Manifest:
    """The files that were certified, byte for byte, and their manifest."""
    _copy(built, writer.path, built.manifest.files)
    manifest = msgspec.structs.replace(
        built.manifest,
        name=writer.out.name,
        parent=parent_record(source, writer.out),
        accuracy=accuracy,
        accuracies=[] if accuracy is None else [accuracy],
        tuning=tuning,
        stage=stage,
    )
    files = writer.describe(manifest).manifest.files
    assert files == built.manifest.files, "what is delivered is what was certified"
    return manifest


def _copy(artifact: Artifact, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        shutil.copyfile(artifact.path / name, folder / name)


def _engines(source: Artifact, backend: str, device: str, options: TuneOptions) -> "EngineSetting | None":
    if not options.runs_engines:
        return None
    from deploy.tune.engines import EngineSetting  # loads what builds them

    return EngineSetting.of(source, backend, device, options.shapes, fp8=options.fp8)


def _backend(asked: str) -> str:
    """The backend that was asked for, or for `auto` the first that is installed in the order for INT8. Raises BackendError."""
    if asked != tune_options.AUTO:
        _version(asked)
        return asked
    reasons = []
    for name in AUTO if has_vnni() else sorted(AUTO, key=lambda name: name == CPU_FORMS):
        try:
            _version(name)
            return name
        except BackendError as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend is installed that mixes can run on: {'; '.join(reasons)}")


def _version(backend: str) -> str:
    named, variant = split_backend(backend)
    return import_backend(BACKENDS[named.name]).version(variant)
