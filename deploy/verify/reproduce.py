"""The smallest files that show a culprit: its layer of A and of B, with the input that both take."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import Feed
from deploy.errors import OutputError
from deploy.precision.cpu import CpuGraph
from deploy.verify.graphs import LOCAL
from deploy.verify.measure import Comparison, Layer

logger = logging.getLogger(__name__)

MOST_NODES = 10


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """path: the folder. nodes: of the larger file. rows: of the input. error: of B's layer against A's on it, as in `Error`."""

    path: str
    nodes: int
    rows: int
    error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_reproduction(comparison: Comparison, layer: Layer, out: Path) -> Reproduction:
    """Write `a.onnx`, `b.onnx`, `input.npz` and `expected.npz` for the layer that computes `layer.tensor`.

    The input is the one row that shows the difference best, where rows can be told apart. Raises OutputError where `out` cannot be
    written.
    """
    a, b, feed, exact = comparison.one(layer.tensor)
    name = f"{layer.tensor}{LOCAL}"
    feed, exact = _one_row(CpuGraph(a), CpuGraph(b), feed, exact, name)
    actual = CpuGraph(b)(feed)[name]
    nodes = max(len(model.graph) for model in (a, b))
    if nodes > MOST_NODES:
        logger.warning("the file that shows the difference has %d nodes: no smaller part of B computes %s", nodes, layer.tensor)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, model in (("a.onnx", a), ("b.onnx", b)):
            save_model(model, out / file)
        np.savez(out / "input.npz", **dict(feed))  # type: ignore[arg-type]  # names of arrays
        np.savez(out / "expected.npz", **{name: exact})  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    rows = max((len(array) for array in feed.values() if array.ndim), default=1)
    scale = float(np.sqrt(np.mean(np.square(exact, dtype=np.float64)))) or 1.0
    off = np.subtract(actual, exact, dtype=np.float64)
    return Reproduction(path=str(out), nodes=nodes, rows=rows, error=float(np.sqrt(np.mean(np.square(off)))) / scale)


def check_folder(out: Path) -> None:
    """Raises OutputError where `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} holds something already: name a new folder for the reproduction")


def _one_row(a: CpuGraph, b: CpuGraph, feed: Feed, exact: np.ndarray, name: str) -> tuple[Feed, np.ndarray]:
    """The row of the largest difference alone, where both compute the same of it alone; else all rows."""
    rows = {len(array) for array in feed.values() if array.ndim}
    if len(rows) != 1 or not exact.ndim or exact.shape[0] not in rows or rows == {1}:
        return feed, exact
    off = np.abs(np.subtract(b(feed)[name], exact, dtype=np.float64)).reshape(len(exact), -1).max(axis=1)
    row = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    one = {key: np.ascontiguousarray(array[row : row + 1]) for key, array in feed.items()}
    expected = a(one)[name]
    same = expected.shape == exact[row : row + 1].shape and np.allclose(
        expected, exact[row : row + 1], rtol=1e-3, atol=1e-5, equal_nan=True
    )
    return (one, expected) if same else (feed, exact)
