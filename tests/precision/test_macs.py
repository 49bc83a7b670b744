"""Multiply-accumulates are those of the textbook, and a shape that is not known is an error and not zero."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.errors import PrecisionError
from deploy.precision.macs import count_macs


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


def test_a_shape_that_depends_on_data_is_an_error() -> None:
    graph = "g (float[n] x, float[1, 4] w) => (float[a, b] y) { i = NonZero(x) j = Cast<to = 1>(i) k = Transpose(j) [op] y = MatMul(k, w) }"
    with pytest.raises(PrecisionError, match="multiply-accumulates of net: no shape for 'k' of MatMul 'op'"):
        count_macs(parsed(graph), {"x": (9,)}, shown="net")
