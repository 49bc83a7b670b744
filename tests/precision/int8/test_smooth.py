"""The smoothed graph computes the same, wherever shifts and scales go."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.smooth import Channels, Smooth

LAYER_NORM = "<float[4] g, float[4] s, float[4, 6] w, float[4, 5] v, float[6] b> {"
NETS = {
    "a norm takes both in": f"{LAYER_NORM} h = LayerNormalization(x, g, s) m = MatMul(h, w) n = Add(m, b) y = Relu(n) }}",
    "a norm that is moved": f"{LAYER_NORM} n = LayerNormalization(x, g, s) r = Constant<value_ints = [-1, 1, 4]>() t = Reshape(n, r) h = Transpose<perm = [1, 0, 2]>(t) y = MatMul(h, w) }}",
    "a norm that is moved and read before": f"{LAYER_NORM} n = LayerNormalization(x, g, s) h = Transpose<perm = [1, 0, 2]>(n) y = MatMul(h, w) z = Relu(n) }}",
    "channels that are moved": f"{LAYER_NORM} n = LayerNormalization(x, g, s) t = Transpose<perm = [0, 2, 1]>(n) r = Constant<value_ints = [2, -1, 4]>() h = Reshape(t, r) y = MatMul(h, w) }}",
    "a norm without a shift": f"{LAYER_NORM} h = LayerNormalization(x, g) y = MatMul(h, w) }}",
    "two layers": f"{LAYER_NORM} h = LayerNormalization(x, g, s) m = MatMul(h, w) n = MatMul(h, v) y = Concat<axis = 2>(m, n) }}",
    "one weight twice": f"{LAYER_NORM} h = LayerNormalization(x, g, s) m = MatMul(h, w) n = MatMul(h, w) y = Add(m, n) }}",
    "a weight that others use": f"{LAYER_NORM} h = LayerNormalization(x, g, s) m = MatMul(h, w) [o] n = MatMul(x, w) y = Add(m, n) }}",
    "a norm that others read": f"{LAYER_NORM} h = LayerNormalization(x, g, s) m = MatMul(h, w) n = Concat<axis = 2>(h, m) y = Relu(n) }}",
    "a norm in steps": f"{LAYER_NORM} n = Tanh(x) k = Mul(n, g) h = Add(k, s) y = MatMul(h, w) }}",
    "a scale alone": f"{LAYER_NORM} n = Tanh(x) h = Mul(n, g) y = MatMul(h, w) }}",
    "an activation": f"{LAYER_NORM} h = HardSwish(x) m = MatMul(h, w) y = Add(m, b) }}",
    "the input": f"{LAYER_NORM} y = MatMul(x, w) }}",
}
FREE = (
    "a norm takes both in",
    "a norm that is moved",
    "a norm without a shift",
    "two layers",
    "one weight twice",
    "a weight that others use",
    "a norm in steps",
)


def smoothed(model: onnx.ModelProto, exclude: tuple[str, ...] = ()) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The graph with channels of h, or else of x, smoothed at random."""
    graph = ir.from_proto(model)
    placement = place(graph, Selection(exclude=exclude))
    rng = np.random.default_rng(1)
    channels = Channels(shift=rng.standard_normal(4).astype(np.float32), scale=np.exp(rng.standard_normal(4)).astype(np.float32))
    Smooth(placement, {"h" if "h" in placement.edges else "x": channels})(graph)
    return graph, {"shift": channels.shift, "scale": channels.scale}


@pytest.mark.parametrize("name", NETS)
def test_the_outputs_stay_the_same(name: str, build) -> None:
    model = build(f"g (float[N, 3, 4] x) => (float[] y) {NETS[name]}")
    graph, _ = smoothed(model, ("o",) if "[o]" in NETS[name] else ())
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    exact, found = CpuGraph(ir.from_proto(model))(feed)["y"], CpuGraph(graph)(feed)["y"]
    np.testing.assert_allclose(found, exact, atol=2e-5, rtol=2e-5)
    added = {node.op_type for node in graph.graph if (node.name or "").startswith(("h_", "x_"))}
    assert added == (set() if name in FREE else {"Mul", "Sub"})


def test_what_the_layer_reads_is_shifted_and_scaled(build) -> None:
    model = build(f"g (float[N, 3, 4] x) => (float[] y) {NETS['a norm takes both in']}")
    graph, by = smoothed(model)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    before, after = (CpuGraph(each, also=["h"])(feed)["h"] for each in (ir.from_proto(model), graph))
    np.testing.assert_allclose(after, (before - by["shift"]) / by["scale"], atol=1e-5)


@pytest.mark.parametrize("layer", ["Gemm(h, w, b)", "Gemm(h, w)", "Gemm<transB = 1>(h, t, b)", "Gemm(h, w, c)"])
def test_every_form_of_gemm(layer: str, build) -> None:
    model = build(
        f"""g (float[N, 4] x) => (float[] y) <float[4] g, float[4] s, float[4, 6] w, float[6, 4] t, float[6] b> {{
            h = LayerNormalization(x, g, s) c = MatMul(x, w) y = {layer} }}"""
    )
    graph, _ = smoothed(model)
    feed = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
    np.testing.assert_allclose(CpuGraph(graph)(feed)["y"], CpuGraph(ir.from_proto(model))(feed)["y"], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("axis", [1, -2])
def test_a_norm_over_several_axes_keeps_its_parameters(axis: int, build) -> None:
    model = build(
        f"""g (float[N, 3, 4] x) => (float[] y) <float[3, 4] g, float[3, 4] s, float[4, 6] w> {{
            h = LayerNormalization<axis = {axis}>(x, g, s) y = MatMul(h, w) }}"""
    )
    graph, _ = smoothed(model)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    np.testing.assert_allclose(CpuGraph(graph)(feed)["y"], CpuGraph(ir.from_proto(model))(feed)["y"], atol=2e-5, rtol=2e-5)
    assert {"Mul", "Sub"} <= {node.op_type for node in graph.graph}


MAPS = {
    "a product": "h = Mul(x, g) z = Conv(h, k, c) y = Relu(z)",
    "several layers": "h = HardSwish(x) z = Conv(h, k, c) o = Conv<strides = [2, 2]>(h, k) y = Relu(z)",
    "one weight twice": "h = HardSwish(x) z = Conv(h, k) o = Conv(h, k) y = Add(z, o)",
}


@pytest.mark.parametrize("name", MAPS)
def test_what_a_convolution_of_one_by_one_reads_is_shifted_and_scaled_by_its_second_axis(name: str, build) -> None:
    model = build(
        f"""g (float[2, 4, 5, 3] x) => (float[] y) <float[4, 1, 1] g, float[6, 4, 1, 1] k, float[6] c> {{ {MAPS[name]} }}"""
    )
    graph, by = smoothed(model)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)}
    exact = CpuGraph(ir.from_proto(model), also=["h"])(feed)
    found = CpuGraph(graph, also=["h_shifted"])(feed)
    np.testing.assert_allclose(found["y"], exact["y"], atol=2e-5, rtol=2e-5)
    shift, scale = (by[what].reshape(4, 1, 1) for what in ("shift", "scale"))
    np.testing.assert_allclose(found["h_shifted"], (exact["h"] - shift) / scale, atol=1e-5, rtol=1e-5)
