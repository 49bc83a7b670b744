"""`deploy.verify.measure`: tensors are compared in passes of bounded memory."""

import numpy as np
import pytest

from deploy.artifact.find import open_artifact
from deploy.progress import silent
from deploy.verify import measure
from deploy.verify.graphs import Graph, paired
from deploy.verify.measure import Comparison
from tests.verify.conftest import Write, multiply


def test_the_errors_are_the_same_in_many_passes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [Graph.read(open_artifact(path)) for path in (write("a.onnx"), write("b.onnx", multiply("w2", 1.01)))]
    feed = {"x": np.random.default_rng(0).standard_normal((3, 3, 12, 12), dtype=np.float32)}
    comparison = Comparison(graphs[0], graphs[1], paired(graphs[0], graphs[1]), feed, silent)
    whole = comparison.layers()
    monkeypatch.setattr(measure, "_PASS_BYTES", 1)
    apart = comparison.layers()
    for layer, other in zip(apart, whole, strict=True):  # ONNX Runtime may fuse what it need not return
        assert layer.local.error == pytest.approx(other.local.error, rel=1e-3)
        assert layer.cumulative.error == pytest.approx(other.cumulative.error, rel=1e-3)
    assert [layer.tensor for layer in whole if layer.local.beyond] == ["c2"]
