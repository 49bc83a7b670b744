"""Without the shifts before convolutions, unsigned codes compute what the signed graph with them does."""

import numpy as np
import onnx_ir as ir
import pytest

from deploy.precision.codes import INT8
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.rewrite import ToCodes
from deploy.precision.int8.unshift import Unshift
from deploy.precision.int8.unsigned import ToUnsigned

NET = "h = Sub(x, c) y = Conv(h, w, b)"
NETS = {
    "a bias": NET,
    "no bias": "h = Sub(x, c) y = Conv(h, w)",
    "two layers": "h = Sub(x, c) m = Conv(h, w, b) n = Conv<strides = [1, 1]>(h, w) y = Max(m, n)",
    "a reader in floating point": "h = Sub(x, c) m = Conv(h, w, b) n = Mul(h, g) y = Max(m, n)",
}
KEPT = {
    "padding": "h = Sub(x, c) y = Conv<pads = [1, 1, 1, 1]>(h, w, b)",
    "a kernel of three": "h = Sub(x, c) y = Conv(h, v, b)",
    "groups": "h = Sub(x, c) y = Conv<group = 2>(h, u, b)",
    "a number for each channel": "h = Sub(x, d) y = Conv(h, w, b)",
    "a difference the other way round": "h = Sub(c, x) y = Conv(h, w, b)",
    "below zero": "h = Sub(x, e) y = Conv(h, w, b)",
}
LOW, HIGH = -0.3, 6.0
SHIFT = (LOW + HIGH) / 2
SCALE = (HIGH - LOW) / 2 / 127


@pytest.fixture
def net(build_with):
    def build(body: str) -> ir.Model:
        rng = np.random.default_rng(0)
        shapes = {"w": (4, 4, 1, 1), "v": (4, 4, 3, 3), "u": (4, 2, 1, 1), "b": (4,), "d": (4, 1, 1), "g": (1,)}
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        arrays |= {"c": np.float32(SHIFT), "e": np.float32(-0.1)}
        used = {name: array for name, array in arrays.items() if f"{name})" in body or f" {name}," in body or f"({name}," in body}
        return ir.from_proto(build_with(f"g (float[2, 4, 20, 20] x) => (float[a, 4, b, c0] y) {{ {body} }}", **used))

    return build


def feed() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).uniform(LOW, HIGH, (2, 4, 20, 20)).astype(np.float32)
    x.reshape(-1)[:2] = LOW, HIGH
    return {"x": x}


def unshifted(model: ir.Model, *, per_tensor: bool = False) -> tuple[ir.Model, Unshift]:
    graph = model.clone()
    unshift = Unshift(place(graph, Selection()), {"h": SCALE}, {"h": LOW - SHIFT}, per_tensor=per_tensor)
    unshift(graph)
    return graph, unshift


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_codes_are_those_of_the_shifted_graph_and_so_are_the_numbers(name: str, per_tensor: bool, net) -> None:
    model = net(NETS[name])
    graph, unshift = unshifted(model, per_tensor=per_tensor)
    np.testing.assert_allclose(CpuGraph(graph)(feed())["y"], CpuGraph(model)(feed())["y"], atol=2e-5)
    assert ("Sub" in {node.op_type for node in graph.graph}) == (name == "a reader in floating point")
    signed = model.clone()
    ToCodes(place(signed, Selection()), {"h": SCALE}, INT8, per_tensor=per_tensor)(signed)
    ToCodes(unshift.placement, unshift.scales, INT8, bias=unshift.bias, per_tensor=per_tensor)(graph)
    ToUnsigned(unshift.lows)(graph)
    exact, rounded, found = (CpuGraph(each)(feed())["y"] for each in (model, signed, graph))
    noise = np.abs(rounded - exact).mean()
    assert 0 < np.abs(found - exact).mean() < 1.2 * noise
    assert np.abs((found - rounded).mean(axis=(0, 2, 3))).max() < noise / 2  # no channel is off as a whole


@pytest.mark.parametrize("name", KEPT)
def test_what_unsigned_codes_have_no_zero_point_for_stays(name: str, net) -> None:
    graph, unshift = unshifted(net(KEPT[name]))
    assert "Sub" in {node.op_type for node in graph.graph}
    assert unshift.bias == {}
    assert set(unshift.placement.edges) == {"h"}


def test_a_tensor_that_has_codes_of_its_own_keeps_them(net) -> None:
    model = net("h = Sub(x, c) m = Conv(h, w, b) k = Conv<pads = [1, 1, 1, 1]>(x, v, b) y = Add(m, k)")
    unshift = Unshift(place(model, Selection()), {"h": SCALE, "x": 0.05}, {"h": LOW - SHIFT, "x": LOW}, per_tensor=False)
    unshift(model)
    assert unshift.scales["x"] == 0.05
    assert len(unshift.placement.edges["x"]) == 2
    assert "h" not in unshift.placement.edges
