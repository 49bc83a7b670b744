import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from deploy.errors import PrecisionError
from deploy.precision.int8.histograms import Activations, collect
from tests.precision.conftest import prepared

RNG = np.random.default_rng(0)


@pytest.fixture
def net() -> ir.Model:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 19]> g (float[N, 1, 8, 8] x) => (float[N, 4, 6, 6] y)
        { [conv] c = Conv(x, w) [relu] r = Relu(c) [log] y = Log(r) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal((4, 1, 3, 3)).astype(np.float32), "w"))
    return prepared(model, opset=19)


def test_inputs_inner_tensors_and_outputs_are_seen(net):
    images = RNG.random((5, 1, 8, 8)).astype(np.float32)
    tensors, outputs = Activations(net, ["x", "r"])({"x": images})
    assert tensors["x"] is images
    assert tensors["r"].shape == (5, 4, 6, 6)
    assert tensors["r"].min() == 0
    assert list(outputs) == ["y"]


@pytest.mark.parametrize("batch", [7, 32])
def test_histograms_do_not_depend_on_the_batch(net, batch):
    images = (RNG.standard_normal((64, 1, 8, 8)) * 10).astype(np.float32)
    activations = Activations(net, ["x", "c"])

    def histograms(size):
        return collect(activations, ({"x": images[start : start + size]} for start in range(0, 64, size)))

    one, other = histograms(1), histograms(batch)
    for name in ("x", "c"):
        assert other[name].amax == pytest.approx(one[name].amax, rel=1e-5)
        assert other[name].total == one[name].total == images.size * {"x": 1, "c": 4 * 36 / 64}[name]
    np.testing.assert_array_equal(one["x"].counts, other["x"].counts)


def test_the_node_that_makes_infinity_is_named(net):
    feed = {"x": np.zeros((1, 1, 8, 8), np.float32)}
    with pytest.raises(PrecisionError, match=r"node 'log' \(Log\) makes numbers that are not finite"):
        collect(Activations(net, ["x", "y"]), [feed])


def test_calibration_data_that_is_not_finite_is_told_from_a_graph_that_breaks(net):
    with pytest.raises(PrecisionError, match="calibration data for input 'x' is not finite"):
        collect(Activations(net, ["x"]), [{"x": np.full((1, 1, 8, 8), np.nan, np.float32)}])
