"""Triton's classification extension: the likeliest classes of an output in place of its numbers, as strings `score:index:name`."""

from collections.abc import Sequence

import numpy as np


def classes_of(scores: np.ndarray, count: int, names: Sequence[str] | None) -> np.ndarray:
    """The `count` largest scores of each row, largest first, as an object array (rows, count) of UTF-8 bytes.

    scores: (rows, ...), of which all but the rows are taken as one list; (classes,) or a single number gives (count,). names: of the
    classes; without as many names as scores, the strings have none.
    """
    rows = scores.reshape(len(scores), -1) if scores.ndim > 1 else scores.reshape(1, -1)
    count = min(count, rows.shape[1])
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    named = names is not None and len(names) == rows.shape[1]
    result = np.empty((len(rows), count), dtype=object)
    for row, indices in enumerate(best):
        for column, index in enumerate(indices.tolist()):
            value = rows[row, index].item()
            score = f"{value:f}" if isinstance(value, float) else str(int(value))
            result[row, column] = f"{score}:{index}{f':{names[index]}' if named and names else ''}".encode()
    return result if scores.ndim > 1 else result[0]


def pack(texts: np.ndarray) -> bytes:
    """Strings as the protocol has them in binary: each behind its length, four bytes, little-endian."""
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts.reshape(-1).tolist())
