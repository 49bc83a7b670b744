"""The feeds that an artifact is compared on with what it was made from, and that activation ranges are read from."""

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest, request_digest
from deploy.artifact.tensors import (
    Feed,
    Profile,
    TensorSpec,
    batch_dim,
    batched,
    example_dims,
    odd_sizes,
    other_sizes,
    random_feed,
    random_feeds,
    row_count,
    slice_rows,
)
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.image_folder import data_digest
from deploy.data.npz_folder import holds_npz, read_npz_folder
from deploy.errors import DataError
from deploy.evidence.parity import PARITY_BATCHES
from deploy.progress import Progress

IMAGES = 128
"""Rows of real data that activation ranges are read from; images are drawn evenly over the classes."""

_RANGE_BATCH = 8


class NamedFeed(NamedTuple):
    """A feed and where it comes from.

    maybe: sizes nobody named, at which the model need not run. expected: what the model makes of it, where that is known.
    """

    data: Literal["random", "images", "feeds"]
    feed: Feed
    maybe: bool = False
    expected: Feed | None = None


def real_data(artifact: Artifact, folder: Path | None) -> CalibrationSet | None:
    """The first `IMAGES` images of an ImageFolder, or feeds of a folder of `.npz` files; None without a folder.

    Raises DataError and UsageError.
    """
    return None if folder is None else calibration_set(artifact, folder, most=IMAGES)


def folder_digest(folder: Path, most: int, *, table: bool = False) -> str:
    """The SHA-256 of what `calibration_set` takes of a folder, with `table` of its table too. Raises DataError."""
    if holds_npz(folder):
        return request_digest({"npz": [file_digest(path) for path, _ in read_npz_folder(folder).sample(most)]})
    return data_digest(folder, most, table=table)


def kind_of(data: CalibrationSet) -> Literal["images", "feeds"]:
    return "images" if data.kind == "images" else "feeds"


def parity_feeds(artifact: Artifact, data: CalibrationSet | None, profile: Profile | None = None) -> list[NamedFeed]:
    """Feeds of `PARITY_BATCHES` rows of `data`, without data made-up ones; as many of the model's own batch where that is fixed.

    profile: the sizes of symbolic dimensions in made-up feeds are those of its optimum; None: the manifest's first profile.
    If other dimensions than the batch are symbolic, one feed more has odd sizes of them.
    """
    specs = artifact.manifest.inputs
    profile = profile or next(iter(artifact.manifest.profiles), None)
    if data is None:
        dims = made_up_dims(specs, profile)
        feeds = [NamedFeed("random", feed) for feed in random_feeds(specs, dims)]
        return feeds + [
            NamedFeed("random", random_feed(specs, sizes, seed=len(feeds) + 1), maybe=True)
            for sizes in other_sizes(specs, dims, profile)
        ]
    feeds = [NamedFeed(kind_of(data), feed) for feed in _of_each_batch(specs, data)]
    if not feeds:
        raise DataError("there is no real input in `data`: at least one image or feed is needed")
    return feeds + [NamedFeed(feeds[0].data, cut, maybe=True) for cut in odd_cut(specs, feeds[0].feed)]


def range_feeds(artifact: Artifact, data: CalibrationSet | None, profile: Profile | None, progress: Progress) -> Iterator[Feed]:
    """The feeds that activation ranges are read from: all of `data`, or those that parity is checked on."""
    feeds = data.feeds(_RANGE_BATCH) if data else (each.feed for each in parity_feeds(artifact, None, profile) if not each.maybe)
    done, total = 0, (data.count or 0) if data else sum(PARITY_BATCHES)
    for feed in feeds:
        progress("reading activation ranges", done, max(done, total))
        yield feed
        done += row_count(feed)


def made_up_dims(specs: Sequence[TensorSpec], profile: Profile | None) -> dict[str, int]:
    """A size for every symbolic dimension of a made-up feed: of the optimum of `profile`, else an example's."""
    dims = example_dims(specs, batch_dim(specs))
    for spec in specs:
        if profile and spec.name in profile:
            dims |= {dim: size for dim, size in zip(spec.shape, profile[spec.name].opt, strict=True) if isinstance(dim, str)}
    return dims


def _of_each_batch(specs: Sequence[TensorSpec], data: CalibrationSet) -> Iterator[Feed]:
    if not batched(specs):
        yield from islice(data.feeds(1), len(PARITY_BATCHES))
        return
    rows = _joined(data, max(PARITY_BATCHES))
    found = row_count(rows) if rows else 0
    for size in dict.fromkeys(min(size, found) for size in PARITY_BATCHES if found):
        yield slice_rows(rows, 0, size)


def _joined(data: CalibrationSet, wanted: int) -> Feed:
    """The first `wanted` rows of `data` in one feed, or as many as are of the sizes of the first."""
    parts: list[Feed] = []
    for feed in data.feeds(wanted):
        if parts and any(feed[name].shape[1:] != array.shape[1:] for name, array in parts[0].items()):
            break
        parts.append(feed)
        if sum(map(row_count, parts)) >= wanted:
            break
    return {name: np.concatenate([part[name] for part in parts])[:wanted] for name in parts[0]} if parts else {}


def odd_cut(specs: Sequence[TensorSpec], feed: Feed) -> Iterator[Feed]:
    """The corner of a real feed that has odd sizes of the symbolic dimensions other than the batch."""
    dims = {
        dim: size for spec in specs for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True) if isinstance(dim, str)
    }
    odd = odd_sizes(specs, dims)
    if odd is not None:
        yield {
            spec.name: feed[spec.name][tuple(slice(0, odd.get(dim, size)) if isinstance(dim, str) else slice(None)
                                             for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True))]
            for spec in specs
        }  # fmt: skip


def calibration_feeds(
    artifact: Artifact, data: CalibrationSet, feeds: Sequence[Feed], expected: Sequence[Feed]
) -> list[NamedFeed]:
    """Feeds of the calibration set, and one of odd sizes where dimensions other than the batch are symbolic.

    expected: what the model makes of `feeds`, or empty.
    """
    kind = kind_of(data)
    odd = (NamedFeed(kind, cut, maybe=True) for cut in odd_cut(artifact.manifest.inputs, feeds[0]))
    return [*(NamedFeed(kind, feed, expected=results) for feed, results in zip_longest(feeds, expected)), *odd]


def first_rows(data: CalibrationSet, batch_size: int, rows: int) -> list[Feed]:
    """Feeds of the first `rows` rows of `data`, which must be readable more than once."""
    found: list[Feed] = []
    for feed in data.feeds(batch_size):
        missing = rows - sum(map(row_count, found))
        if missing <= 0:
            break
        found.append(slice_rows(feed, 0, missing) if batched(data.specs) else feed)
    return found
