"""The inputs that candidates are timed on: the same for all, random or real, in turns, and larger than the cache together."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploy.artifact.manifest import Artifact
from deploy.artifact.tensors import TensorSpec, batch_dim, random_feed
from deploy.data.images import Feed, image_feeds
from deploy.errors import BackendError, DataError
from deploy.host.cpu import cache_bytes

MOST_BYTES = 128 << 20
"""Of all inputs together, whatever the size of the cache."""

MOST = 4096
"""Inputs at most: for a small model that is less than the cache."""


def make_feeds(artifact: Artifact, specs: tuple[TensorSpec, ...], dims: Mapping[str, int], data: Path | None) -> list[Feed]:
    """Feeds of these sizes, two at least, larger than the cache together as far as MOST and MOST_BYTES let them.

    Random ones are the same in every process: standard normal, never zeros. data: an ImageFolder to take images of instead,
    as many as there are. Raises BackendError where memory is out, DataError for a folder that holds too few images.
    """
    try:
        if data is None:
            return _random(specs, dims)
        return _images(artifact, specs, dims, data)
    except MemoryError as error:
        sizes = ", ".join(f"{name} {size}" for name, size in dims.items())
        raise BackendError(f"no memory for an input with {sizes}: {error}") from error


def _random(specs: tuple[TensorSpec, ...], dims: Mapping[str, int]) -> list[Feed]:
    first = random_feed(specs, dims)
    wanted = _wanted(first)
    batch = batch_dim(specs)
    if batch is None or any(not spec.shape or spec.shape[0] != batch for spec in specs):
        return [first, *(random_feed(specs, dims, seed=seed) for seed in range(1, min(wanted, 64)))]
    rows = dims[batch]
    whole = random_feed(specs, {**dims, batch: rows * wanted})
    return [{name: array[at : at + rows] for name, array in whole.items()} for at in range(0, rows * wanted, rows)]


def _images(artifact: Artifact, specs: tuple[TensorSpec, ...], dims: Mapping[str, int], data: Path) -> list[Feed]:
    batch = batch_dim(specs)
    rows = dims[batch] if batch is not None else specs[0].concrete(dims)[0]
    wanted = min(_wanted(random_feed(specs, dims)), 64)  # decoding takes time
    feeds = [feed for feed in image_feeds(artifact, data, batch_size=rows, count=rows * wanted) if _rows(feed) == rows]
    if not feeds:
        raise DataError(f"--data {data} holds too few images for a batch of {rows}")
    return feeds if len(feeds) > 1 else feeds * 2


def _rows(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def _wanted(feed: Feed) -> int:
    """How many feeds of this size are twice as large as the cache."""
    nbytes = max(1, sum(array.nbytes for array in feed.values()))
    most = min(2 * (cache_bytes() or MOST_BYTES), MOST_BYTES)
    return min(max(2, -(-most // nbytes)), MOST)


def total_bytes(feeds: list[Feed]) -> int:
    return sum(np.asarray(array).nbytes for feed in feeds for array in feed.values())
