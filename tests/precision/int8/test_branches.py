"""Layers in the branches of If, in the passes and through the whole of quantization."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import deploy
from deploy.data.calibration_set import calibration_set
from deploy.evidence.parity import difference
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.branches import ShareScope, branched_nodes, with_outputs
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import quantize_onnx
from tests.precision.conftest import prepared

LAYERS = "p = {}(x) h = Conv(p, w) r = Relu(h) k = Conv(r, v) s = Add(k, p) e = Concat<axis = 1>(s, h) y = Conv(e, u)"
"""A residual sum and a Concat, under the same names in both branches."""
TEXT = f"""g (float[N, 4, 6, 6] x, bool c) => (float[N, 4, 6, 6] z) {{
    b = If(c) <then_branch = g1 () => (float[N, 4, 6, 6] y1) {{ {LAYERS.format("Relu")} y1 = Identity(y) }},
               else_branch = g2 () => (float[N, 4, 6, 6] y2) {{ {LAYERS.format("Tanh")} y2 = Identity(y) }}>
    z = Relu(b)
}}"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def branched(shared: bool = False) -> onnx.ModelProto:
    """Each branch has its own weights, which are of the same names too; or both have those of the main graph."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {TEXT}')
    rng = np.random.default_rng(0)
    for attribute in model.graph.node[0].attribute:
        for name, shape in {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1), "u": (4, 8, 1, 1)}.items():
            array = rng.normal(size=shape).astype(np.float32)
            attribute.g.initializer.append(onnx.numpy_helper.from_array(array, name))
    if shared:
        then, other = (attribute.g for attribute in model.graph.node[0].attribute)
        model.graph.initializer.extend(then.initializer)
        del then.initializer[:], other.initializer[:]
    return model


def feed(run: bool, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 4, 6, 6)).astype(np.float32), "c": np.array(run)}


def quantized(folder, taken, options=None, shared=False):
    """The artifact that was quantized and the result, calibrated on feeds that run the branches `taken`; written and read back."""
    onnx.save(branched(shared), folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    feeds = [feed(run, seed) for seed, run in enumerate(taken * 4)]
    result = quantize_onnx(artifact, calibration_set(artifact, feeds), options or QuantizeOptions())
    result.save(folder / "int8.onnx")
    return result, CpuGraph.read(folder / "net.onnx"), CpuGraph.read(folder / "int8.onnx")


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("options", [{}, {"method": "auto"}, {"fp16": True}], ids=str)
def test_the_layers_of_both_branches_are_quantized_each_with_its_own_ranges(tmp_path, options, shared):
    result, exact, rounded = quantized(tmp_path, [True, False], QuantizeOptions(**options), shared)
    nodes = list(result.model.graph.all_nodes())
    assert sum(node.op_type == "Conv" and node.graph is not result.model.graph for node in nodes) == 6
    assert all(node.inputs[1].producer().op_type == "DequantizeLinear" for node in nodes if node.op_type == "Conv")
    assert sum("Conv" in layer.node for layer in result.calibration.layers) == 6
    assert not [exclusion for exclusion in result.exclusions if "Conv" in exclusion.node]
    for run in (True, False):
        given = feed(run, 99)
        assert difference(rounded(given)["z"], exact(given)["z"]).sqnr_db > 25


def test_a_branch_that_no_feed_runs_stays_as_it_was_and_is_named(tmp_path, caplog):
    result, exact, rounded = quantized(tmp_path, [True])
    assert sum("Conv" in layer.node for layer in result.calibration.layers) == 3
    assert {exclusion.reason for exclusion in result.exclusions} == {"no calibration data runs the branch of If that it is in"}
    assert "3 layers stay in floating point" in caplog.text
    assert result.calibration.share == 0.5  # of both branches; that one of them is not INT8 is no error
    given = feed(False, 99)
    np.testing.assert_allclose(rounded(given)["z"], exact(given)["z"], rtol=1e-5, atol=1e-6)
    assert difference(rounded(feed(True, 99))["z"], exact(feed(True, 99))["z"]).sqnr_db > 25


def test_calibration_from_the_cache_leaves_the_same_branch_alone(tmp_path):
    first, _, _ = quantized(tmp_path, [True])
    again, _, _ = quantized(tmp_path, [True])
    assert again.exclusions == first.exclusions
    assert ir.to_proto(again.model) == ir.to_proto(first.model)


MATRICES = """g (float[N, 8] x, bool c, bool d, int64 n) => (float[N, 8] z) {
    y = If(c) <then_branch = g1 () => (float[N, 8] a) { p = MatMul(x, w) q = Gelu(p) r = MatMul(q, v) a = Add(r, b) },
               else_branch = g2 () => (float[N, 8] e) {
        e = If(d) <then_branch = g3 () => (float[N, 8] u) { k = MatMul(x, v) u = Add(k, b) },
                   else_branch = g4 () => (float[N, 8] t) {
            yes = Constant<value = bool {1}>()
            t = Loop(n, yes, x) <body = g5 (int64 i, bool ci, float[N, 8] h) => (bool co, float[N, 8] o)
                                 { co = Identity(ci) [body] o = MatMul(h, w) }> }> }>
    z = MatMul(y, w)
}"""


@pytest.mark.parametrize("options", [{}, {"method": "auto"}, {"fp16": True}, {"per_tensor": True}], ids=str)
def test_matrices_of_the_main_graph_are_int8_in_nested_branches_and_not_in_a_loop(tmp_path, parse, options):
    model = parse(MATRICES)
    rng = np.random.default_rng(0)
    for name, shape in {"w": (8, 8), "v": (8, 8), "b": (8,)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array((rng.normal(size=shape) / 3).astype(np.float32), name))
    onnx.save(model, tmp_path / "net.onnx")
    artifact = deploy.open_artifact(tmp_path / "net.onnx")
    feeds = [
        {"x": rng.normal(size=(4, 8)).astype(np.float32), "c": np.array(i % 3 == 0), "d": np.array(i % 3 == 1), "n": np.array(2)}
        for i in range(9)
    ]
    result = quantize_onnx(artifact, calibration_set(artifact, feeds), QuantizeOptions(**options))
    result.save(tmp_path / "int8.onnx")
    assert len(result.calibration.layers) == 4
    assert {exclusion.node: exclusion.reason for exclusion in result.exclusions}["body"] == "it is in the body of a loop"
    exact, rounded = CpuGraph.read(tmp_path / "net.onnx"), CpuGraph.read(tmp_path / "int8.onnx")
    for given in feeds[:3]:
        assert difference(rounded(given)["z"], exact(given)["z"]).sqnr_db > 30


def test_values_of_branches_get_names_of_their_own_and_weights_move_to_the_main_graph():
    model = prepared(branched())
    before = CpuGraph(model)(feed(False, 1))["z"]
    assert ShareScope()(model).modified
    made = [value.name for graph in model.graphs() for node in graph for value in node.outputs]
    assert len(made) == len(set(made))
    assert [len(graph.initializers) for graph in model.graphs()] == [6, 0, 0]
    assert all(value.dtype is not None for graph in model.graphs() for node in graph for value in node.outputs)
    np.testing.assert_allclose(CpuGraph(model)(feed(False, 1))["z"], before, rtol=1e-4, atol=1e-5)


def test_a_tensor_of_a_nested_branch_is_empty_where_it_was_not_computed(parse):
    model = prepared(
        parse(
            """g (float[4] x, bool c, bool d) => (float[4] y) {
                y = If(c) <then_branch = g1 () => (float[4] p) {
                    p = If(d) <then_branch = g2 () => (float[4] q) { a = Relu(x) q = Neg(a) },
                               else_branch = g3 () => (float[4] r) { r = Tanh(x) }> },
                    else_branch = g4 () => (float[4] s) { s = Exp(x) }>
            }"""
        )
    )
    ShareScope()(model)
    extended, shown = with_outputs(model, ["a", "s", "y"])
    assert set(shown) == {"a", "s"}
    assert [node.op_type for node in branched_nodes(model.graph)] == ["Relu", "Neg", "Tanh", "If", "Exp", "If"]  # as it was
    run = CpuGraph(extended, also=list(shown.values()))
    x = np.arange(4, dtype=np.float32) - 1
    for outer, inner, sizes in [(True, True, [4, 0]), (True, False, [0, 0]), (False, True, [0, 4])]:
        results = run({"x": x, "c": np.array(outer), "d": np.array(inner)})
        assert [results[shown[name]].size for name in ("a", "s")] == sizes
    np.testing.assert_array_equal(run({"x": x, "c": np.array(True), "d": np.array(True)})[shown["a"]], np.maximum(x, 0))


UNEVEN = """g (float[N, 8] x, bool c) => (float[N, 8] z) {
    y = If(c) <then_branch = g1 () => (float[N, 8] p) {
                   n = LayerNormalization(x, steep, zero) [left] m = MatMul(n, rising) p = Tanh(m) },
               else_branch = g2 () => (float[N, 8] q) {
                   h = HardSwish(x) k = Mul(h, steep) [right] q = MatMul(k, rising) }>
    z = MatMul(y, plain)
}"""


def uneven(folder, parse, **options):
    """Branches whose layers read channels of very different ranges; calibrated and written, in both forms."""
    model = parse(UNEVEN)
    rng = np.random.default_rng(0)
    steep = np.array([1000, 1, 1, 1, 1, 1, 1, 1], np.float32)
    rising = rng.standard_normal((8, 8)).astype(np.float32) / steep[:, None]
    plain = rng.standard_normal((8, 8)).astype(np.float32)
    for name, array in {"steep": steep, "zero": 0 * steep, "rising": rising, "plain": plain}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(model, folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    feeds = [{"x": rng.standard_normal((4, 8)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(16)]
    result = quantize_onnx(artifact, calibration_set(artifact, feeds), QuantizeOptions(**options), cpu=True)
    result.save(folder / "int8.onnx")
    result.cpu.save(folder / "cpu.onnx")
    exact = CpuGraph.read(folder / "net.onnx")
    runs = [CpuGraph.read(folder / name) for name in ("int8.onnx", "cpu.onnx")]
    noise = [difference(run(given)["z"], exact(given)["z"]).sqnr_db for run in runs for given in feeds[:2]]
    without_rounding = CpuGraph(result.cpu.unrounded(folder / "cpu.onnx"))
    for given in feeds[:2]:
        np.testing.assert_allclose(without_rounding(given)["z"], exact(given)["z"], rtol=1e-3, atol=1e-2)
    return result, noise


@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"bias_correction": False}], ids=str)
def test_channels_are_evened_out_in_each_branch(tmp_path, parse, options):
    result, noise = uneven(tmp_path, parse, keep_below=-100.0, **options)
    assert {"n", "k"} <= set(result.calibration.smoothed)
    assert min(noise) > 25
    again, _ = uneven(tmp_path, parse, keep_below=-100.0, **options)  # from the cache
    assert ir.to_proto(again.model) == ir.to_proto(result.model)
    assert ir.to_proto(again.cpu.model) == ir.to_proto(result.cpu.model)


def test_a_layer_of_a_branch_that_loses_too_much_is_in_floating_point_in_both_forms(tmp_path, parse):
    result, noise = uneven(tmp_path, parse, keep_below=39.0, min_share=60)
    kept = {exclusion.node: exclusion.reason for exclusion in result.exclusions}
    assert list(kept) == ["right"]
    assert "38 dB, below 39 (`keep_below`)" in kept["right"]
    for model in (result.model, result.cpu.model):
        nodes = {node.name: node for node in model.graph.all_nodes()}
        assert [nodes[name].inputs[1].is_initializer() for name in ("left", "right")] == [False, True]
        assert nodes["right"].inputs[0].producer().op_type in ("Mul", "Sub")
    assert min(noise) > 25


def test_onnx_runtime_computes_on_codes_in_branches_too(tmp_path):
    onnx.save(branched(), tmp_path / "net.onnx")
    artifact = deploy.open_artifact(tmp_path / "net.onnx")
    feeds = [feed(run, seed) for seed, run in enumerate([True, False] * 4)]
    form = quantize_onnx(artifact, calibration_set(artifact, feeds), QuantizeOptions(), cpu=True).cpu
    form.save(tmp_path / "cpu.onnx")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "cpu.onnx"), settings, providers=["CPUExecutionProvider"])
    made = [node.op_type for node in ir.from_proto(onnx.load(tmp_path / "optimized.onnx")).graph.all_nodes()]
    assert made.count("QLinearConv") >= 4
    exact, rounded = CpuGraph.read(tmp_path / "net.onnx"), CpuGraph.read(tmp_path / "cpu.onnx")
    for run in (True, False):
        assert difference(rounded(feed(run, 99))["z"], exact(feed(run, 99))["z"]).sqnr_db > 25


def test_a_branch_that_only_later_feeds_run_is_right_in_the_cpu_form(tmp_path):
    onnx.save(branched(), tmp_path / "net.onnx")
    artifact = deploy.open_artifact(tmp_path / "net.onnx")
    feeds = [feed(run, seed) for seed, run in enumerate([True] * 40 + [False] * 4)]
    form = quantize_onnx(artifact, calibration_set(artifact, feeds), QuantizeOptions(), cpu=True).cpu
    form.save(tmp_path / "cpu.onnx")
    exact, rounded = CpuGraph.read(tmp_path / "net.onnx"), CpuGraph.read(tmp_path / "cpu.onnx")
    for run in (True, False):
        assert difference(rounded(feed(run, 99))["z"], exact(feed(run, 99))["z"]).sqnr_db > 25
