"""Shifts and scales of what attention gives go into the layer of its values where it is sure which column is which channel."""

import numpy as np
import onnx_ir as ir
import pytest

from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.attention import columns_of
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.smooth import Channels, Smooth

TOKENS, HEADS, WIDTH = 4, 2, 8
WEIGHTS = {
    "wq": (8, 8),
    "wk": (8, 8),
    "wv": (8, 8),
    "bv": (8,),
    "wg": (8, 4),
    "wz": (8, 24),
    "bz": (24,),
    "w": (8, 5),
    "tv": (8, 8),
}
SHAPES = {"heads": [0, 0, 2, 4], "joined": [0, 0, 8], "one": [0, 0, 1, 4], "three": [0, 0, 3, 2, 4], "twice": [1, 2, 1, 1]}
NUMBERS = {"zero": 0, "first": 1, "last": 2, "front": [0]}
APART = """[q] q = MatMul(x, wq) qs = Reshape(q, heads) qh = Transpose<perm = [0, 2, 1, 3]>(qs)
    [k] k = MatMul(x, wk) ks = Reshape(k, heads) kh = Transpose<perm = [0, 2, 3, 1]>(ks)"""
PROBABLE = "s = MatMul(qh, kh) p = Softmax(s)"
VALUES = "[v] m = MatMul(x, wv) v = Add(m, bv) vs = Reshape(v, heads) vh = Transpose<perm = [0, 2, 1, 3]>(vs)"
JOINED = "[o] o = MatMul(p, vh) t = Transpose<perm = [0, 2, 1, 3]>(o) h = Reshape(t, joined) y = MatMul(h, w)"
IN_ONE = "[v] m = MatMul(x, wz) z = Add(m, bz)"
FIVE = "zs = Reshape(z, three) zt = Transpose<perm = [2, 0, 3, 1, 4]>(zs)"
KEYS = "kh = Transpose<perm = [0, 1, 3, 2]>(kr)"
FOUND = {
    "heads": f"{APART} {PROBABLE} {VALUES} {JOINED}",
    "values without a bias": f"{APART} {PROBABLE} [v] v = MatMul(x, wv) vs = Reshape(v, heads) vh = Transpose<perm = [0, 2, 1, 3]>(vs) {JOINED}",
    "one head": "[q] q = MatMul(x, wq) kt = Transpose<perm = [0, 2, 1]>(x) s = MatMul(q, kt) p = Softmax(s) [v] m = MatMul(x, wv) v = Add(bv, m) [o] h = MatMul(p, v) y = MatMul(h, w)",
    "gathered": f"{IN_ONE} {FIVE} qh = Gather(zt, zero) kr = Gather(zt, first) vh = Gather(zt, last) {KEYS} {PROBABLE} {JOINED}",
    "split in front": f"{IN_ONE} {FIVE} q1, k1, v1 = Split<axis = 0, num_outputs = 3>(zt) qh = Squeeze(q1, front) kr = Squeeze(k1, front) vh = Squeeze(v1, front) {KEYS} {PROBABLE} {JOINED}",
    "split behind": f"{IN_ONE} q, k, v = Split<axis = 2, num_outputs = 3>(z) {APART.replace('[q] q = MatMul(x, wq)', '').replace('[k] k = MatMul(x, wk)', '')} {PROBABLE} vs = Reshape(v, heads) vh = Transpose<perm = [0, 2, 1, 3]>(vs) {JOINED}",
}  # fmt: skip
SCALED = {
    "probabilities that do not add up": f"{APART} s = MatMul(qh, kh) p = Sigmoid(s) {VALUES} {JOINED}",
    "a Softmax over another axis": f"{APART} s = MatMul(qh, kh) p = Softmax<axis = 1>(s) {VALUES} {JOINED}",
}
ALONE = {
    "heads that share their values": f"{APART} {PROBABLE} [v] v = MatMul(x, wg) vs = Reshape(v, one) vh = Transpose<perm = [0, 2, 1, 3]>(vs) {JOINED}",
    "heads that are repeated": f"{APART} {PROBABLE} [v] v = MatMul(x, wg) vs = Reshape(v, one) v1 = Transpose<perm = [0, 2, 1, 3]>(vs) vh = Tile(v1, twice) {JOINED}",
    "values that others read": f"{APART} {PROBABLE} {VALUES} [o] o = MatMul(p, vh) t = Transpose<perm = [0, 2, 1, 3]>(o) h = Reshape(t, joined) g = MatMul(h, w) u = MatMul(v, w) y = Add(g, u)",
    "values that are keys too": f"{IN_ONE} {FIVE} qh = Gather(zt, zero) kr = Gather(zt, last) vh = Gather(zt, last) {KEYS} {PROBABLE} {JOINED}",
    "rows for columns": f"{APART} {PROBABLE} [v] m = MatMul(x, wv) v = Add(m, bv) vs = Reshape(v, heads) vh = Transpose<perm = [0, 2, 3, 1]>(vs) pt = Transpose<perm = [0, 1, 3, 2]>(p) [o] o = MatMul(vh, pt) t = Transpose<perm = [0, 3, 1, 2]>(o) h = Reshape(t, joined) y = MatMul(h, w)",
    "a sum on the way": f"{APART} {PROBABLE} {VALUES} [o] o = MatMul(p, vh) t = Transpose<perm = [0, 2, 1, 3]>(o) j = Reshape(t, joined) h = Add(j, x) y = MatMul(h, w)",
    "no attention": "[v] v = MatMul(x, wv) vs = Reshape(v, heads) t = Transpose<perm = [0, 1, 2, 3]>(vs) h = Reshape(t, joined) y = MatMul(h, w)",
}  # fmt: skip


@pytest.fixture
def net(build_with):
    def build(body: str) -> ir.Model:
        rng = np.random.default_rng(0)
        used = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
        arrays |= {name: np.array(value, np.int64) for name, value in (SHAPES | NUMBERS).items()}
        text = f"g (float[N, {TOKENS}, {WIDTH}] x) => (float[] y) {{ {body} }}"
        return ir.from_proto(build_with(text, **{name: array for name, array in arrays.items() if name in used}))

    return build


def smoothed(model: ir.Model, *, shift: bool) -> tuple[ir.Model, Channels]:
    rng = np.random.default_rng(1)
    off = rng.standard_normal(WIDTH).astype(np.float32) * shift
    channels = Channels(shift=off, scale=np.exp(rng.standard_normal(WIDTH)).astype(np.float32))
    graph = model.clone()
    products = tuple(node.name for node in graph.graph if node.name == "o")
    Smooth(place(graph, Selection(exclude=products)), {"h": channels})(graph)
    return graph, channels


def run(model: ir.Model) -> dict[str, np.ndarray]:
    feed = {"x": np.random.default_rng(2).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)}
    return CpuGraph(model, also=["h"])(feed)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", [*FOUND, *SCALED, *ALONE])
def test_the_outputs_stay_the_same_and_nodes_are_added_only_where_the_values_cannot_absorb(name: str, shift: bool, net) -> None:
    model = net((FOUND | SCALED | ALONE)[name])
    graph, channels = smoothed(model, shift=shift)
    before, after = run(model), run(graph)
    np.testing.assert_allclose(after["y"], before["y"], atol=2e-4, rtol=2e-5)
    free = name in FOUND or (name in SCALED and not shift)
    added = {node.op_type for node in graph.graph if (node.name or "").startswith("h_")}
    assert added == (set() if free else {"Mul", "Sub"} if shift else {"Mul"})
    if free:
        np.testing.assert_allclose(after["h"], (before["h"] - channels.shift) / channels.scale, atol=1e-4, rtol=1e-4)


def values_of(model: ir.Model) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == "h")


def test_the_columns_of_the_values_are_the_last_third_where_all_are_in_one(net) -> None:
    for name in ("gathered", "split in front", "split behind"):
        found = columns_of(values_of(net(FOUND[name])))
        assert found is not None
        assert found.layer.name == "v"
        assert found.channels.tolist() == [-1] * 16 + list(range(8))


@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_sure_is_left_alone(name: str, net) -> None:
    assert columns_of(values_of(net(ALONE[name]))) is None
