"""`deploy.verify.culprits`: of layers that were rewritten together, the one with the fault is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.verify.verify import Verification, verify

RNG = np.random.default_rng(0)
UNITS = RNG.uniform(0.1, 8, 8).astype(np.float32)
TEXT = """
    <ir_version: 10, opset_import: ["" : 21]>
    attention (float[batch, 24, 8] x) => (float[batch, 24, 8] y) {
        [norm] n = LayerNormalization(x, g, shift)
        [q] q = MatMul(n, wq)
        [k] k = MatMul(n, wk)
        [turned] t = Transpose<perm = [0, 2, 1]>(k)
        [scores] s = MatMul(q, t)
        [softmax] p = Softmax(s)
        [mix] m = MatMul(p, n)
        [relu] r = Relu(m)
        [fc] y = MatMul(r, wf)
    }
"""
WEIGHTS = {
    "g": RNG.uniform(0.5, 1.5, 8),
    "shift": RNG.standard_normal(8) * 0.1,
    **{name: RNG.standard_normal((8, 8)) * 0.3 for name in ("wq", "wk", "wf")},
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the network with weights multiplied by factors."""

    def write(name: str, *factors: tuple[str, object]) -> Path:
        arrays = {key: array.astype(np.float32) for key, array in WEIGHTS.items()}
        for key, factor in factors:
            arrays[key] = (arrays[key] * factor).astype(np.float32)
        model = onnx.parser.parse_model(TEXT)
        model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return write


SMOOTHED = (
    ("g", UNITS),
    ("shift", UNITS),
    ("wq", 1 / UNITS[:, None]),
    ("wk", 1 / UNITS[:, None]),
    ("wf", 1 / UNITS[:, None]),
)
"""The norm in other units: the products with it take them back, the last one behind what passes them on."""


def one(row: int, column: int, factor: float) -> np.ndarray:
    factors = np.ones((8, 8), dtype=np.float32)
    factors[row, column] = factor
    return factors


def nodes_of(found: Verification) -> list[str]:
    return [layer.node for layer in found.culprits]


def test_a_smoothed_norm_is_no_culprit_nor_what_undoes_it(make: Make) -> None:
    found = verify(make("a.onnx"), make("b.onnx", *SMOOTHED))
    assert (nodes_of(found), found.beyond) == ([], [])
    assert found.rewritten[:1] == ["n"]


@pytest.mark.parametrize(
    ("factors", "culprit"),
    [
        pytest.param(("wq", one(2, 3, 1.02)), "q", id="one weight of a reader"),
        pytest.param(("wk", 1.01), "k", id="a scale of a reader"),
        pytest.param(("wf", one(1, 1, 1.5)), "fc", id="a reader behind other layers"),
        pytest.param(("wq", one(2, 3, -1000)), "q", id="a large fault"),
        pytest.param(("g", [1, 1, 1.1, 1, 1, 1, 1, 1]), "norm", id="the norm itself"),
    ],
)
def test_of_layers_that_were_rewritten_together_the_one_with_the_fault_is_named(
    make: Make, factors: tuple[str, object], culprit: str
) -> None:
    found = verify(make("a.onnx"), make("b.onnx", *SMOOTHED, factors))
    assert nodes_of(found)[:1] == [culprit]
    if culprit != "norm":
        assert nodes_of(found) == [culprit]


def test_a_scale_that_nothing_undoes_is_a_fault_beside_another_one(make: Make) -> None:
    found = verify(make("a.onnx"), make("b.onnx", ("g", 1.001), ("wf", one(1, 1, 1.5))))
    assert nodes_of(found) == ["norm", "fc"]


def test_a_network_that_was_equalized_from_its_beginning_to_its_end_has_no_culprit(tmp_path: Path) -> None:
    """Longer than any trail: each product but the last is in other units, and quantized, so that all of it is."""
    rng = np.random.default_rng(1)
    depth = 10
    weights = [rng.standard_normal((8, 8)).astype(np.float32) * np.float32(0.5) for _ in range(depth)]
    units = [
        np.ones(8, dtype=np.float32),
        *rng.uniform(0.6, 1.5, (depth - 1, 8)).astype(np.float32),
        np.ones(8, dtype=np.float32),
    ]
    paths = []
    for name, chosen in (("a.onnx", [np.ones(8, dtype=np.float32)] * (depth + 1)), ("b.onnx", units)):
        nodes, arrays = [], {"zero": np.zeros((), dtype=np.int8)}
        values = rng.standard_normal((5 * 64, 8))
        for index, weight in enumerate(weights):
            arrays[f"w{index}"] = (weight * chosen[index + 1] / chosen[index][:, None]).astype(np.float32)
            source = "x" if index == 0 else f"r{index - 1}"
            if name == "b.onnx":
                arrays[f"s{index}"] = np.array(np.abs(values).max() * 1.1 / 127, dtype=np.float32)
                values = np.maximum(values @ arrays[f"w{index}"], 0)
                nodes += [
                    helper.make_node("QuantizeLinear", [source, f"s{index}", "zero"], [f"q{index}"]),
                    helper.make_node("DequantizeLinear", [f"q{index}", f"s{index}", "zero"], [f"d{index}"]),
                ]
                source = f"d{index}"
            nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"m{index}"], name=f"m{index}"))
            nodes.append(helper.make_node("Relu", [f"m{index}"], ["y" if index == depth - 1 else f"r{index}"], name=f"r{index}"))
        shapes = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", 64, 8]) for value in ("x", "y")]
        initializers = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
        graph = helper.make_graph(nodes, "chain", shapes[:1], shapes[1:], initializers)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / name)
        paths.append(tmp_path / name)
    found = verify(*paths)
    assert nodes_of(found) == []
    assert "m0" in found.rewritten


VALUES = """<ir_version: 10, opset_import: ["": 20]> g (float[2, 4, 8] x) => (float[2, 4, 8] y)
    <int64[4] heads = {2, 4, 2, 4}, int64[3] joined = {2, 4, 8}> {
    [value] m = MatMul(x, w) z = Add(m, b) vs = Reshape(z, heads) vh = Transpose<perm = [0, 2, 1, 3]>(vs)
    qs = Reshape(x, heads) qh = Transpose<perm = [0, 2, 1, 3]>(qs) kh = Transpose<perm = [0, 2, 3, 1]>(qs) s = MatMul(qh, kh)
    p = Softmax(s) o = MatMul(p, vh) t = Transpose<perm = [0, 2, 1, 3]>(o) h = Reshape(t, joined) [out] y = MatMul(h, v)
}"""


def test_values_of_attention_in_other_units_that_the_projection_undoes_are_no_fault(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(VALUES)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"w": (8, 8), "b": 8, "v": (8, 8)}.items()}
    by = np.exp2(rng.integers(-3, 4, 8)).astype(np.float32)
    for name, factors in (("a", {}), ("b", {"w": by, "b": by, "v": 1 / by[:, None]})):
        made = onnx.ModelProto()
        made.CopyFrom(model)
        for weight, array in weights.items():
            tensor = (array * factors.get(weight, 1)).astype(np.float32)
            made.graph.initializer.append(onnx.numpy_helper.from_array(tensor, weight))
        onnx.save(onnx.shape_inference.infer_shapes(made), tmp_path / f"{name}.onnx")
    found = verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (nodes_of(found), found.beyond) == ([], [])
    assert found.rewritten == ["m", "z"]
