"""`deploy.verify.graphs`: what is paired, and what is cut out."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.artifact.find import open_artifact
from deploy.precision.cpu import CpuGraph
from deploy.verify.graphs import Graph, cut, paired, unlike_pairs
from tests.verify.conftest import Write


def test_every_tensor_of_a_copy_is_paired_in_order(write: Write) -> None:
    a, b = (Graph.read(open_artifact(write(name))) for name in ("a.onnx", "b.onnx"))
    assert paired(a, b) == ["c1", "r1", "c2", "s", "p", "f", "y"]


def test_a_cut_computes_each_target_from_what_is_fed_and_nothing_before(write: Write) -> None:
    graph = Graph.read(open_artifact(write("a.onnx")))
    part = cut(graph.model, ["s", "y"], ["c1", "r1", "c2", "f"])
    assert sorted(value.name or "" for value in part.graph.inputs) == ["c2", "f", "r1"]
    assert [node.op_type for node in part.graph] == ["Add", "Gemm"]
    zeros = np.zeros((2, 8, 12, 12), dtype=np.float32)
    out = CpuGraph(part)({"c2": zeros + 1, "r1": zeros + 2, "f": np.zeros((2, 8), dtype=np.float32)})
    assert float(out["s:computed"].max()) == 3.0
    assert len(graph.model.graph) == 7  # the model itself is left as it was
    assert [value.name for value in graph.model.graph.inputs] == ["x"]


def test_a_target_that_is_fed_to_others_is_computed_all_the_same(write: Write) -> None:
    graph = Graph.read(open_artifact(write("a.onnx")))
    part = cut(graph.model, ["r1", "c2"], ["c1", "r1", "c2"])
    assert sorted(value.name or "" for value in part.graph.inputs) == ["c1", "r1"]
    ones = np.ones((1, 8, 12, 12), dtype=np.float32)
    out = CpuGraph(part)({"c1": -ones, "r1": ones})
    assert not out["r1:computed"].any()
    assert out["c2:computed"].any()


@pytest.mark.parametrize(
    ("scale", "zero", "found"), [(0.1, 0, set()), (0.11, 0, {"y"}), (0.1, 1, {"y"})], ids=["alike", "a scale", "a zero point"]
)
def test_an_operand_that_is_read_back_otherwise_than_it_was_quantized_is_found(
    tmp_path: Path, scale: float, zero: int, found: set[str]
) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        quantized (float[batch, 2] x) => (float[batch, 2] z)
        <float there = {{0.1}}, float back = {{{scale}}}, int8 zero = {{0}}, int8 other = {{{zero}}}, float[2, 2] w = {{1, 2, 3, 4}}> {{
            [q] q = QuantizeLinear(x, there, zero)
            [dq] d = DequantizeLinear(q, back, other)
            [product] y = MatMul(d, w)
            [relu] z = Relu(y)
        }}
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    assert unlike_pairs(Graph.read(open_artifact(tmp_path / "a.onnx"))) == found
