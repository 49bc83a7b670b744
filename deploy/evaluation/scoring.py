"""A metric on the data of one artifact: what it is made of, and what it is given of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed
from deploy.errors import BackendError, DataError, UsageError
from deploy.evaluation.annotated import Boxed, check_folders, labelled
from deploy.evaluation.classifier import check_names, class_scores
from deploy.evaluation.detector import decode_of, detect, placement_of
from deploy.evaluation.fidelity import Cosine, Sqnr
from deploy.evaluation.iou import MeanIoU
from deploy.evaluation.labelled import Batch, Labelled, Npz, check_values
from deploy.evaluation.metric import Metric
from deploy.evaluation.options import MetricOptions, folder_of
from deploy.evaluation.segmenter import class_count, class_maps, map_output, plane
from deploy.evaluation.topk import TopK
from deploy.evaluation.usermetric import UserMetric
from deploy.host.extras import missing
from deploy.words import count_of, printable

FIDELITY: dict[str, type[Metric]] = {"sqnr": Sqnr, "cosine": Cosine}
"""The metrics that need no labels: they compare with the outputs of another artifact."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A metric, the data it is measured on, and how a model's outputs are read for it.

    make: an empty metric. read: from the results of a batch, which may have more rows than targets, what `Metric.update` takes.
    Raises DataError, UsageError and UserCodeError for results or targets that it cannot read.
    """

    options: MetricOptions
    data: Labelled
    make: Callable[[], Metric]
    read: Callable[[Feed, Batch], Any]


def scoring(artifact: Artifact, place: Path, options: MetricOptions) -> Scoring:
    """The metric of `options` for `artifact` on the data at `place`, a folder or a COCO JSON.

    Raises, before any work, UsageError for outputs that the metric cannot read, DataError for data that cannot be used or has
    other targets than it takes, UserCodeError for a metric of the user's that cannot be made, and BackendError where pycocotools
    is not installed.
    """
    if options.own is not None:
        return _own(artifact, place, options)
    if options.metric in FIDELITY:
        data = labelled(artifact, place, None)
        return Scoring(options=options, data=data, make=FIDELITY[options.metric], read=lambda results, batch: results)
    if options.metric == "miou":
        return _miou(artifact, place, options)
    if options.metric == "map":
        return _map(artifact, place, options)
    return _topk(artifact, place, options)


def check_scoring(artifact: Artifact, place: Path, options: MetricOptions) -> None:
    """Raise what `scoring` raises, and DataError for targets that cannot be used: all masks are read."""
    scoring(artifact, place, options).data.check()


def _topk(artifact: Artifact, place: Path, options: MetricOptions) -> Scoring:
    try:
        output = class_scores(artifact)
    except UsageError as error:
        raise UsageError(f"{error}; {options.metric} is of classifiers: segmenters have `metric` miou, detectors map") from error
    count = output.shape[1]
    known = count if isinstance(count, int) else None
    data = labelled(artifact, place, "classes", classes=known)

    def read(results: Feed, batch: Batch) -> np.ndarray:
        scores = results[output.name][: len(batch.files)]
        check_names(artifact, scores.shape[1])
        check_folders(artifact, data.root, data.classes, scores.shape[1])
        check_values(batch.files, batch.targets, scores.shape[1])
        return scores

    k = int(options.metric.removeprefix("top"))
    return Scoring(options=options, data=data, make=lambda: TopK(k, artifact.manifest.classes), read=read)


def _miou(artifact: Artifact, place: Path, options: MetricOptions) -> Scoring:
    output = map_output(artifact)
    count = class_count(artifact, output)
    if count is None:
        raise UsageError(f"{artifact.location} does not say how many classes it has: export it with --classes FILE")
    ignore = options.ignore_index
    data = labelled(artifact, place, "masks", classes=count, ignore=ignore)

    def read(results: Feed, batch: Batch) -> np.ndarray:
        array, masks = results[output.name][: len(batch.files)], batch.targets
        size = masks.shape[1:]
        sizes = [plane(artifact, each.shape) for each in (*batch.feed.values(), array) if each.ndim > 2]
        if isinstance(data, Npz) and size not in sizes:  # of outputs whose size was not known before
            shown = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in sizes))
            raise DataError(f"{printable(batch.files[0])} has masks of {size[0]}x{size[1]}; the model takes and gives {shown}")
        maps = class_maps(artifact, array, size)
        if maps.size and not 0 <= maps.min() <= maps.max() < count:
            raise UsageError(f"{artifact.location} gives class {maps.max()}, and has {count_of(count, 'class')}")
        return maps

    return Scoring(options=options, data=data, make=lambda: MeanIoU(count, ignore, artifact.manifest.classes), read=read)


def _map(artifact: Artifact, place: Path, options: MetricOptions) -> Scoring:
    try:
        from deploy.evaluation.coco import MeanAveragePrecision  # loads pycocotools
    except ImportError as error:
        raise missing(error, "`metric` map") or BackendError(f"`metric` map needs pycocotools: {error}") from error
    decode_of(artifact)
    data = labelled(artifact, place, "boxes")
    assert isinstance(data, Boxed)
    names = _class_names(artifact, data)
    return Scoring(
        options=options, data=data, make=lambda: MeanAveragePrecision(data.labels, names), read=_boxes_of(artifact, data)
    )


def _class_names(artifact: Artifact, data: Boxed) -> Sequence[str]:
    """The names of the classes by index, those of the data where the model has none."""
    return artifact.manifest.classes or [data.names.get(index, str(index)) for index in range(max(data.names) + 1)]


def _boxes_of(artifact: Artifact, data: Boxed) -> Callable[[Feed, Batch], Any]:
    preprocess = data.preprocess

    def read(results: Feed, batch: Batch) -> Any:
        return detect(artifact, results, [placement_of(preprocess, path) for path in batch.files])

    return read


def _own(artifact: Artifact, place: Path, options: MetricOptions) -> Scoring:
    function = options.function()
    assert function is not None
    assert options.own is not None
    folder = folder_of(options.own)

    def make() -> UserMetric:
        return UserMetric(options.metric, function, folder, lower=options.lower)

    make()  # raises now what is wrong with it
    data = labelled(artifact, place, "anything", ignore=options.ignore_index)
    if isinstance(data, Boxed):
        decode_of(artifact)
        return Scoring(options=options, data=data, make=make, read=_boxes_of(artifact, data))

    def read(results: Feed, batch: Batch) -> Any:
        rows = {name: array[: len(batch.files)] for name, array in results.items()}
        return rows if len(rows) > 1 else next(iter(rows.values()))

    return Scoring(options=options, data=data, make=make, read=read)
