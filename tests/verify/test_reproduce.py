"""`deploy.verify.reproduce`: a small file and one row show the difference by themselves."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.errors import OutputError
from deploy.verify.verify import verify
from tests.verify.conftest import Write, multiply


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0])


def test_the_file_and_its_input_show_the_difference(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = verify(write("a.onnx"), write("b.onnx", multiply("w2", 1.01, (3, 2, 1, 1))), reproduce=out)
    assert found.reproduction is not None
    feed = dict(np.load(out / "input.npz"))
    expected = np.load(out / "expected.npz")["c2:computed"]
    a, b = run(out / "a.onnx", feed), run(out / "b.onnx", feed)
    np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)
    assert list(feed) == ["r1"]
    assert len(feed["r1"]) == found.reproduction.rows == 1
    off = float(np.sqrt(np.mean((b - a) ** 2) / np.mean(a**2)))
    assert off == pytest.approx(found.reproduction.error, rel=1e-2)
    assert off > 1e-5
    assert found.reproduction.nodes == len(onnx.load(out / "b.onnx").graph.node) == 1


def test_without_a_culprit_nothing_is_written(write: Write, tmp_path: Path) -> None:
    assert verify(write("a.onnx"), write("b.onnx"), reproduce=tmp_path / "out").reproduction is None
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_before_the_work(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputError, match="holds something"):
        verify(write("a.onnx"), write("b.onnx"), reproduce=tmp_path / "out")
