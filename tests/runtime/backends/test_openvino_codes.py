"""Unsigned codes of activations, and INT8 weights on processors that add products of bytes in 16 bits."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploy
from deploy.host.cpu import adds_in_16_bits
from deploy.runtime.backends import openvino as backend
from tests.runtime.backends.codes import LAYERS, bright, exact, halved, quantized, set_array, signed


def read(model: onnx.ModelProto, tmp_path: Path) -> "backend.openvino.Model":
    onnx.save(model, tmp_path / "layer.onnx")
    return backend._CORE.read_model(tmp_path / "layer.onnx")


@pytest.mark.parametrize("also", ["", "weight", "codes"])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_have_half_the_codes_and_twice_the_scale(kind: str, also: str, tmp_path: Path) -> None:
    model = quantized(kind, also=also)
    opened = read(model, tmp_path)
    assert backend.halve_weights(opened) == (2 if also == "codes" else 1)
    assert backend.halve_weights(opened) == 0
    x = bright(kind)
    compiled = backend._CORE.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found, expected in zip(compiled(x).values(), exact(halved(model), x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("change", "kind"), [({"zero": 3}, "Conv"), ({"most": 64}, "Conv"), ({"most": 64}, "MatMul")])
def test_weights_with_a_zero_point_or_small_codes_stay(change: dict[str, int], kind: str, tmp_path: Path) -> None:
    assert backend.halve_weights(read(quantized(kind, **change), tmp_path)) == 0


def test_what_is_between_codes_and_a_layer_may_stay_there(tmp_path: Path) -> None:
    model = quantized("Conv")
    (layer,) = (node for node in model.graph.node if node.op_type == "Conv")
    layer.input[0] = "p"
    model.graph.node.insert(2, onnx.helper.make_node("MaxPool", ["d"], ["p"], kernel_shape=[2, 2]))
    opened, x = read(model, tmp_path), bright("Conv")
    assert backend.halve_weights(opened) == 1
    compiled = backend._CORE.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (expected,) = exact(halved(model), x)
    np.testing.assert_allclose(compiled(x)[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_of_layers_that_read_floats_stay(tmp_path: Path) -> None:
    model = quantized("Conv")
    (layer,) = (node for node in model.graph.node if node.op_type == "Conv")
    layer.input[0] = "x"
    for name in ("QuantizeLinear", "DequantizeLinear"):
        model.graph.node.remove(next(node for node in model.graph.node if node.op_type == name))
    assert backend.halve_weights(read(model, tmp_path)) == 0


def test_constants_of_other_graphs_stay(shared_lenet5: deploy.Artifact) -> None:
    assert backend.halve_weights(backend._CORE.read_model(shared_lenet5.onnx_path)) == 0


@pytest.mark.parametrize("kind", LAYERS)
def test_a_session_is_as_exact_as_its_weights_on_every_processor(kind: str, tmp_path: Path) -> None:
    model, x = quantized(kind), bright(kind)
    onnx.save(model, tmp_path / "layer.onnx")
    (expected,) = exact(halved(model) if adds_in_16_bits() else model, x)
    with deploy.load(tmp_path / "layer.onnx", "openvino") as session:
        (found,) = session.run({"x": x}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("overflows", "times"), [(True, 2), (False, 1)])
def test_the_processor_decides(overflows: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "adds_in_16_bits", lambda: overflows)
    model = quantized("Gemm")
    onnx.save(model, tmp_path / "layer.onnx")
    with deploy.load(tmp_path / "layer.onnx", "openvino") as session:
        (found,) = session.run({"x": np.full((4, 64), 0.01, np.float32)}).values()  # codes of 1: nothing overflows
    (expected,) = exact(halved(model) if times == 2 else model, np.full((4, 64), 0.01, np.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


POSITIVE = {
    "Relu": ["Relu x"],
    "Clip": ["Clip x zero six"],
    "Sigmoid": ["Sigmoid x"],
    "Softmax": ["Softmax x"],
    "Abs": ["Abs x"],
    "Relu, MaxPool": ["Relu x", "MaxPool a kernel_shape=3 pads=1"],
    "Relu, AveragePool": ["Relu x", "AveragePool a kernel_shape=3 pads=1"],
    "Relu, a product and a sum": ["Relu x", "Sigmoid x", "Mul a b", "Add a c"],
    "Relu, Concat": ["Relu x", "Sigmoid x", "Concat a b axis=3"],
    "Relu, Transpose": ["Relu x", "Transpose a"],
    "Relu, a slice": ["Relu x", "Slice a from to"],
    "Relu, Reshape": ["Relu x", "Reshape a shape"],
    "Relu, Pad with zeros": ["Relu x", "Pad a around zero"],
    "Relu, a sum with a positive constant": ["Relu x", "Add a six"],
    "a conversion before": ["Relu x", "QuantizeLinear a six sz", "DequantizeLinear b six sz", "MaxPool c kernel_shape=3 pads=1"],
    "a conversion to unsigned before": ["Relu x", "QuantizeLinear a six uz", "DequantizeLinear b six uz", "MaxPool c kernel_shape=3 pads=1"],
}  # fmt: skip
OTHERS = {
    "an input": ["Identity x"],
    "LeakyRelu": ["LeakyRelu x"],
    "Clip that lets negatives by": ["Clip x minus six"],
    "a difference": ["Relu x", "Sigmoid x", "Sub a b"],
    "a sum with an input": ["Relu x", "Add a x"],
    "a product with an input": ["Relu x", "Mul a x"],
    "a sum with a negative constant": ["Relu x", "Add a minus"],
    "Concat with an input": ["Relu x", "Concat a x axis=3"],
    "Pad with a negative number": ["Relu x", "Pad a around minus"],
    "Relu, Resize that overshoots": ["Relu x", "Resize a nothing scales mode=cubic"],
    "a conversion to shifted codes before": ["Sigmoid x", "QuantizeLinear a six shift", "DequantizeLinear b six sz"],
}  # fmt: skip
CONSTANTS = {
    "zero": np.float32(0), "six": np.float32(6), "minus": np.float32(-1), "sz": np.int8(0), "uz": np.uint8(0), "shift": np.int8(-120),
    "from": np.array([1, 1]), "to": np.array([4, 6]), "shape": np.array([4, 8, 36, 1]), "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "nothing": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32),
}  # fmt: skip


def behind(steps: list[str], step: float = 0.01) -> onnx.ModelProto:
    """A product with signed activations of this step, behind operators: each has the inputs that are named, and the names a, b, c by itself."""
    nodes = []
    for name, text in zip("abcefg", steps, strict=False):
        operator, *words = text.split()
        attributes = dict(word.split("=") for word in words if "=" in word)
        known = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "axis": 3, "mode": "cubic"}
        inputs = ["" if word == "nothing" else word for word in words if "=" not in word]
        nodes.append(helper.make_node(operator, inputs, [name], **{key: known[key] for key in attributes}))
    last = nodes[-1].output[0]
    used = {word for node in nodes for word in node.input} & set(CONSTANTS)
    nodes += [
        helper.make_node("QuantizeLinear", [last, "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["y"]),
    ]
    arrays = {name: CONSTANTS[name] for name in used} | {"xs": np.array(step, np.float32), "xz": np.array(0, np.int8)}
    graph = helper.make_graph(
        nodes,
        "behind",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def finer(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with unsigned activations up to the same largest number."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    set_array(made, "xz", np.array(0, np.uint8))
    set_array(made, "xs", np.array(np.float32(0.01 * 127 / 255)))
    return made


def compiled(model: "backend.openvino.Model", x: np.ndarray) -> list[np.ndarray]:
    return list(backend._CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x).values())


@pytest.mark.parametrize("kind", LAYERS)
def test_activations_without_negatives_have_finer_steps_to_the_same_largest_number(kind: str, tmp_path: Path) -> None:
    model, x = signed(kind), 2 * bright(kind) - 3  # from 0 to 2.1, of which 1.27 fit
    opened = read(model, tmp_path)
    assert backend.unsign(opened) == 1
    assert backend.unsign(opened) == 0
    backend.halve_weights(opened)
    (expected,) = exact(halved(finer(model)), x)
    np.testing.assert_allclose(compiled(opened, x)[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("steps", POSITIVE.values(), ids=POSITIVE)
def test_what_has_no_negatives_is_found(steps: list[str], tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 8, 6, 6), dtype=np.float32)
    model = behind(steps)
    opened = read(model, tmp_path)
    before = sum(text.startswith("QuantizeLinear") and "sz" in text for text in steps)
    assert backend.unsign(opened) == 1 + before
    if not before:
        (expected,) = exact(finer(model), x)
        np.testing.assert_allclose(
            compiled(opened, x)[0], expected, rtol=0, atol=0.02 * 1.27
        )  # half a step, where 0.5 is rounded


@pytest.mark.parametrize("steps", OTHERS.values(), ids=OTHERS)
def test_what_may_have_negatives_stays_signed(steps: list[str], tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 8, 6, 6), dtype=np.float32)
    opened = read(behind(steps), tmp_path)
    assert backend.unsign(opened) == 0
    (expected,) = exact(behind(steps), x)
    np.testing.assert_allclose(compiled(opened, x)[0], expected, rtol=0, atol=0.02 * 1.28)


@pytest.mark.parametrize("change", ["output", "zero point", "unsigned"])
def test_codes_that_mean_something_else_stay(change: str, tmp_path: Path) -> None:
    model = behind(["Relu x"])
    if change == "output":
        model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.INT8, None))
    elif change == "zero point":
        set_array(model, "xz", np.array(-128, np.int8))
    else:
        set_array(model, "xz", np.array(0, np.uint8))
    assert backend.unsign(read(model, tmp_path)) == 0


@pytest.mark.parametrize("through", ["", "Transpose"])
def test_the_second_operand_of_a_product_of_activations_stays_signed(through: str, tmp_path: Path) -> None:
    model = behind(["Relu x"])
    last = model.graph.node.pop()
    if through:
        model.graph.node.append(helper.make_node(through, ["d"], ["e"]))
    read_by = "e" if through else "d"
    shapes = {"first": [4, 8, 6, 6], "second": [6, 6, 8, 4]}["second" if through else "first"]
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [*shapes[:2], 6, shapes[2]]))
    model.graph.node.append(helper.make_node("MatMul", ["z", read_by], list(last.output)))
    assert backend.unsign(read(model, tmp_path)) == 0
    model.graph.node[-1].input[:] = [read_by, "z"]
    model.graph.input[-1].type.tensor_type.shape.dim[-1].dim_value = 5
    model.graph.input[-1].type.tensor_type.shape.dim[-2].dim_value = shapes[3]
    assert backend.unsign(read(model, tmp_path)) == 1


def test_all_readers_of_codes_get_the_finer_scale(tmp_path: Path) -> None:
    model = behind(["Relu x"])
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["again"]))
    model.graph.node.append(helper.make_node("Sqrt", ["again"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    opened, x = read(model, tmp_path), np.linspace(0, 2, 4 * 8 * 36, dtype=np.float32).reshape(4, 8, 6, 6)
    assert backend.unsign(opened) == 1
    for found, expected in zip(compiled(opened, x), exact(finer(model), x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * 1.27)


@pytest.mark.parametrize("overflows", [True, False])
def test_a_session_has_unsigned_activations_on_every_processor(
    overflows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "adds_in_16_bits", lambda: overflows)
    model = signed("Gemm")
    onnx.save(model, tmp_path / "layer.onnx")
    x = np.full((4, 64), 0.004, np.float32)  # no code of the file, the first of the finer steps: nothing overflows
    with deploy.load(tmp_path / "layer.onnx", "openvino") as session:
        (found,) = session.run({"x": x}).values()
    (expected,) = exact(halved(finer(model)) if overflows else finer(model), x)
    assert np.abs(expected).max() > 0
    assert np.abs(exact(model, x)).max() == 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
