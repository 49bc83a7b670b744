from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import open_onnx
from deploy.errors import BackendError
from deploy.runtime.load import open_session


def test_zeros_come_in_the_shapes_and_dtypes_of_the_outputs(pair: Artifact, half: Artifact) -> None:
    with open_session(pair, "null") as session:
        results = session.run({"x": np.ones((5, 4), np.float32), "index": np.ones(5, np.int64)})
    assert {name: x.shape for name, x in results.items()} == {"y": (5, 3), "total": (5,), "same": (5, 4), "anchors": (3,)}
    assert not any(x.any() for x in results.values())
    with open_session(half, "null") as session:
        assert session(torch.ones(2, 1, 28, 28, dtype=torch.float16)).dtype == torch.float16


def test_a_size_that_no_input_has_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nonzero.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (int64[1, found] y) { y = NonZero(x) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(BackendError, match=r"null cannot know the size of 'found' of the output y: int64 1xfound"):
        open_session(open_onnx(path), "null")
