"""The random inputs that a session is timed on, which together are larger than the cache."""

from collections.abc import Mapping

import numpy as np

from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, random_feed
from deploy.host.cpu import cache_bytes

MOST_BYTES = 128 << 20
"""The most bytes of all inputs together, however large the cache is."""
MOST = 4096
"""The most inputs; for a small model, these are smaller than the cache."""


def random_inputs(specs: tuple[TensorSpec, ...], dims: Mapping[str, int]) -> list[Feed]:
    first = random_feed(specs, dims)
    wanted = wanted_feeds(first)
    batch = batch_dim(specs)
    if batch is None or any(not spec.shape or spec.shape[0] != batch for spec in specs):
        return [first, *(random_feed(specs, dims, seed=seed) for seed in range(1, min(wanted, 64)))]
    rows = dims[batch]
    whole = random_feed(specs, {**dims, batch: rows * wanted})
    return [{name: array[at : at + rows] for name, array in whole.items()} for at in range(0, rows * wanted, rows)]


def row_count(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def wanted_feeds(feed: Feed) -> int:
    """The number of feeds of this size that together are twice as large as the cache."""
    nbytes = max(1, sum(array.nbytes for array in feed.values()))
    most = min(2 * (cache_bytes() or MOST_BYTES), MOST_BYTES)
    return min(max(2, -(-most // nbytes)), MOST)


def total_bytes(feeds: list[Feed]) -> int:
    return sum(np.asarray(array).nbytes for feed in feeds for array in feed.values())
