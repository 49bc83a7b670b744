from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.artifact.onnxfile import open_onnx
from deploy.errors import PrecisionError
from deploy.precision.checked import check_prepared

FEED = {"x": np.array([[1.0, -2.0]], dtype=np.float32)}


def test_a_prepared_graph_that_computes_something_else_is_refused(parse, tmp_path: Path) -> None:
    onnx.save(parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }"), tmp_path / "net.onnx")
    artifact = open_onnx(tmp_path / "net.onnx")
    check_prepared(artifact, [(FEED, {"y": np.array([[1.0, 0.0]], dtype=np.float32)})])
    with pytest.raises(PrecisionError, match=r"computes something else .* export it with a newer one"):
        check_prepared(artifact, [(FEED, {"y": np.array([[1.0, 0.01]], dtype=np.float32)})])
