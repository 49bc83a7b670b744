"""The batches that an engine or a package takes: those of its profiles. Files are fed to it so, and rows that are too few filled up."""

import numpy as np

from deploy.artifact.tensors import Feed, batch_range, batched, row_count
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.session import Session


def nearest_batch(session: Session, wanted: int, reason: str) -> tuple[int, str]:
    """The largest batch that the session takes and that is not larger than `wanted`, else its least, and the reason if it is another.

    reason: why `wanted` is not what was asked for, or "".
    """
    ranges = _ranges(session)
    if not ranges:
        return wanted, reason
    size = max((min(high, wanted) for low, high in ranges if low <= wanted), default=min(low for low, _ in ranges))
    if size == wanted:
        return wanted, reason
    takes = " or ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)
    return size, f"it takes batches of {takes}"


def filled_rows(session: Session, rows: int) -> int:
    """The least batch of at least `rows` rows that the session takes; `rows` where there is none, which it will say."""
    return min((max(low, rows) for low, high in _ranges(session) if high >= rows), default=rows)


def filled(session: Session, feed: Feed) -> Feed:
    """A feed with as many rows as the session takes, the last one repeated: its results have more rows, too."""
    if not _ranges(session) or not batched(session.inputs):
        return feed
    rows = row_count(feed)
    wanted = filled_rows(session, rows)
    return feed if wanted == rows else {name: array[np.arange(wanted).clip(max=rows - 1)] for name, array in feed.items()}


def _ranges(session: Session) -> list[tuple[int, int]]:
    """The least and the largest batch of each profile; none where any batch is taken, or one that is fixed."""
    backend = BACKENDS.get(session.backend.partition(":")[0])
    if backend is None or backend.runs not in ("engine", "package"):
        return []
    found = [batch_range(session.inputs, profile) for profile in session.profiles]
    return [each for each in found if each is not None] if None not in found else []
