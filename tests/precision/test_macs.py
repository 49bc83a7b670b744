"""Multiply-accumulates are those of the textbook, and what cannot be counted is unknown and not zero."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.precision.macs import count_in_branches, count_macs


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))


@pytest.mark.parametrize(
    ("graph", "macs"),
    [
        (
            "g (float[n, 4, 8, 8] x, float[6, 2, 3, 3] w) => (float[a, b, c, d] y) { [op] y = Conv<group = 2>(x, w) }",
            2 * 6 * 36 * 18,
        ),
        (
            "g (float[n, 4, 8, 8] x, float[4, 6, 2, 2] w) => (float[a, b, c, d] y) { [op] y = ConvTranspose(x, w) }",
            2 * 4 * 64 * 24,
        ),
        ("g (float[n, 5] x, float[7, 5] w) => (float[a, b] y) { [op] y = Gemm<transB = 1>(x, w) }", 2 * 5 * 7),
        ("g (float[n, 3, 5] x, float[5, 7] w) => (float[a, b, c] y) { [op] y = MatMul(x, w) }", 2 * 3 * 5 * 7),
    ],
)
def test_each_operator_is_counted_at_the_shapes_that_are_given(graph: str, macs: int) -> None:
    model = parsed(graph)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first = tuple(dim if isinstance(dim, int) else 2 for dim in model.graph.inputs[0].shape or ())
    assert count_macs(model, {"x": first}) == {"op": macs}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_shapes_that_the_graph_computes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(8, 27))\n"
        "    def forward(self, x):\n"
        "        return self.weight @ torch.nn.functional.unfold(x, 3, padding=1)\n"
    )
    exported = deploy.export("net", model="net.py:Net", inputs=["x=1x3xHxW"])
    assert list(count_macs(ir.load(exported.onnx_path), {"x": (2, 3, 16, 12)}).values()) == [2 * 8 * 27 * 16 * 12]
    engine = deploy.build_trt(exported, "engine", precision="fp16", shapes=["x=1x3x8x8:2x3x16x16:4x3x32x32"])
    assert engine.manifest.precision_share is not None
    assert engine.manifest.precision_share.fp16 == 1


@pytest.mark.parametrize(
    ("graph", "macs"),
    [
        ("i = NonZero(x) j = Cast<to = 1>(i) k = Transpose(j) [op] y = MatMul(k, w)", {"op": None}),
        (
            "[op] a = MatMul(x, w) [more] b = Einsum<equation = 'ij,kj->ik'>(a, w) y = Identity(b)",
            {"op": 3 * 4 * 4, "more": None},
        ),
        (
            "f = ReduceSum<keepdims = 0>(x) c = Cast<to = 9>(f)"
            " [branch] y = If(c) <then_branch = t () => (float[a, b] p) { [in] p = MatMul(x, w) },"
            " else_branch = e () => (float[a, b] q) { q = Identity(x) }>",
            {"branch": None},
        ),
    ],
    ids=["a shape of the data", "an einsum", "inside an if"],
)
def test_what_cannot_be_counted_is_unknown_and_the_rest_is_counted(graph: str, macs: dict[str, int | None]) -> None:
    model = parsed(f"g (float[n, 4] x, float[4, 4] w) => (float[a, b] y) {{ {graph.replace(chr(39), chr(34))} }}")
    assert count_macs(model, {"x": (3, 4)}) == macs


def test_shapes_are_known_behind_an_operator_that_onnx_does_not_infer() -> None:
    graph = "g (float[n, 4, 8] x, float[4] s, float[4] b, float[8, 5] w) => (float[p, q, r] y) {"
    model = parsed(graph + " a = GroupNormalization<num_groups = 2>(x, s, b) [op] y = MatMul(a, w) }")
    model.opset_imports[""] = 21
    assert count_macs(model, {"x": (2, 4, 8)}) == {"op": 2 * 4 * 8 * 5}


def test_branches_of_if_are_counted_by_themselves_and_bodies_of_loops_are_not() -> None:
    model = parsed(
        """g (float[N, 8] x, float[8, 8] w, bool c, int64 n) => (float[N, 8] z) {
            y = If(c) <then_branch = g1 () => (float[N, 8] p) { [then] p = MatMul(x, w) },
                       else_branch = g2 () => (float[N, 8] t) {
                [yes] one = Constant<value = bool {1}>()
                [loop] t = Loop(n, one, x) <body = g3 (int64 i, bool a, float[N, 8] h) => (bool b, float[N, 8] o)
                                            { [go] b = Identity(a) [body] o = MatMul(h, w) }> }>
            [out] z = MatMul(y, w) }"""
    )
    assert count_in_branches(model, {"x": (3, 8)}) == {"then": 3 * 64}
