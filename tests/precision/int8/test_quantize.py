"""The parts of quantization together, on artifacts in memory; what the stage makes of it is in tests/pipeline/test_quantize.py."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Calibration, LayerNoise
from deploy.artifact.tensors import ShapeRange
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.errors import PrecisionError
from deploy.evidence.parity import difference
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.equalize import Equalize
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import hint, quantize_onnx

PAIR = "h = Conv(x, w) r = Relu(h) y = Conv(r, v)"
APART = "h = Conv(x, w) r = Sigmoid(h) y = Conv(r, v)"  # a Sigmoid does not commute with a scale
OUTLIER = "h = Conv(x, a) r = Relu(h) y = Conv(r, b)"  # of the channels between, one is at 400 times the other
DEPTHWISE_APART = "h = Conv<group = 2>(x, d) r = Sigmoid(h) y = Conv(r, v)"
DEPTHWISE_PAIR = "h = Conv<group = 2>(x, d) r = Relu(h) y = Conv(r, v)"
EQUAL = "h = Conv(x, o) r = Relu(h) y = Conv(r, o)"  # o is used twice: no layer may change it


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def net(folder: Path, body: str) -> Artifact:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    spread, outlier = np.array([1, 30]).reshape(2, 1, 1, 1), np.array([1, 400]).reshape(2, 1, 1, 1)
    for name, shape in {
        "w": (2, 2, 1, 1),
        "v": (2, 2, 1, 1),
        "d": (2, 1, 1, 1),
        "o": (2, 2, 1, 1),
        "a": (2, 2, 1, 1),
        "b": (2, 2, 1, 1),
    }.items():
        if any(name in node.input for node in proto.graph.node):
            by = {"a": outlier, "b": 1 / outlier.reshape(1, 2, 1, 1)}.get(name, spread)
            array = (rng.uniform(0.5, 1, shape) * by).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    folder.mkdir()
    onnx.save(proto, folder / "net.onnx")
    return deploy.open_artifact(folder / "net.onnx")


def data_for(artifact: Artifact) -> CalibrationSet:
    rng = np.random.default_rng(1)
    return calibration_set(artifact, [{"x": rng.standard_normal((8, 2, 4, 4)).astype(np.float32)}])


@pytest.mark.parametrize(
    ("body", "options", "equalized"),
    [
        (PAIR, QuantizeOptions(equalize=True), True),
        (PAIR, QuantizeOptions(per_tensor=True), True),
        (PAIR, QuantizeOptions(equalize=False), False),
        (PAIR, QuantizeOptions(), False),  # there is no depthwise convolution
        (OUTLIER, QuantizeOptions(), True),
        (OUTLIER, QuantizeOptions(equalize=False, keep_below=-100.0), False),
        (DEPTHWISE_PAIR, QuantizeOptions(), True),
        (APART, QuantizeOptions(equalize=True), False),
        (APART, QuantizeOptions(per_tensor=True), False),
        (DEPTHWISE_APART, QuantizeOptions(), False),
        (EQUAL, QuantizeOptions(equalize=True), False),
    ],
)
def test_the_record_says_whether_ranges_were_equalized_and_not_whether_it_was_asked_for(tmp_path, body, options, equalized):
    artifact = net(tmp_path / "net", body)
    assert quantize_onnx(artifact, data_for(artifact), options).calibration.equalized is equalized


@pytest.mark.parametrize("floats", ["fp32", "fp16"])
def test_the_file_is_read_once(tmp_path, monkeypatch, floats):
    artifact = net(tmp_path / "net", PAIR)
    read = []
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda *args, **options: read.append(args) or load(*args, **options))
    quantize_onnx(artifact, data_for(artifact), QuantizeOptions(equalize=True, fp16=floats == "fp16"))
    assert len(read) == 1


def test_equalization_is_compared_with_the_graph_before_it(tmp_path, monkeypatch):
    artifact = deploy.export(tmp_path / "net", arch="mobilenet_v1", inputs=["input=1x3x32x32"], model_args={"width": 0.25})
    rng = np.random.default_rng(0)
    feeds = [{"input": rng.standard_normal((8, 3, 32, 32)).astype(np.float32)}]
    data = calibration_set(artifact, feeds)
    assert quantize_onnx(artifact, data, QuantizeOptions()).calibration.equalized

    class Wrong(Equalize):
        def call(self, model):
            result = super().call(model)
            last = next(value for value in model.graph.initializers.values() if value.shape == (1000, 256))
            last.const_value = ir.tensor(-last.const_value.numpy(), name=last.name)
            return result

    monkeypatch.setattr("deploy.precision.int8.equalize.Equalize", Wrong)
    with pytest.raises(PrecisionError, match=r"computes something else once the graph is .* equalized"):
        quantize_onnx(artifact, data, dataclasses.replace(QuantizeOptions(), method="max"))


def test_the_hint_names_the_noisiest_layers_and_the_options():
    layers = [LayerNoise(node="conv1", sqnr_db=3.4), LayerNoise(node="dead", sqnr_db=None), LayerNoise(node="conv2", sqnr_db=20)]
    record = Calibration(
        data=None, kind="images", rows=1, skipped=[], method="max", per_tensor=False, bias_correction=True, equalized=False,
        floats="fp32", layers=layers,
    )  # fmt: skip
    assert hint(record).startswith("the most sensitive layers: conv1 (3 dB), conv2 (20 dB); ")
    for text in (hint(record), hint(None)):
        assert "`exclude`" in text
        assert "`method`" in text


GRAPHS = {
    "one weight as Gemm with a bias and as MatMul": (
        "g (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w, float[8] b> { a = Gemm(x, w, b) h = Relu(a) y = MatMul(h, w) }"
    ),
    "one weight along two axes": (
        "g (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w, float[8] b> { a = Gemm<transB = 1>(x, w, b) y = MatMul(a, w) }"
    ),
    "one weight with two biases": (
        "g (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w, float[8] b, float[1] c> { a = Gemm(x, w, b) y = Gemm(a, w, c) }"
    ),
    "a product of two matrices": (
        """g (float[T, 8] x) => (float[T, T] y) <float[8, 6] w, float[8, 6] v> {
            q = MatMul(x, w) k = MatMul(x, v) t = Transpose<perm = [1, 0]>(k) y = MatMul(q, t) }"""
    ),
    "a matrix and a stack of them": (
        """g (float[T, 8] x) => (float[3, T, T] y) <float[8, 6] w, float[3, 8, 6] v> {
            q = MatMul(x, w) k = MatMul(x, v) t = Transpose<perm = [0, 2, 1]>(k) y = MatMul(q, t) }"""
    ),
    "a bias for each row": "g (float[4, 8] x) => (float[4, 6] y) <float[8, 6] w, float[4, 6] b> { y = Gemm(x, w, b) }",
    "a bias for the rows alone": "g (float[4, 8] x) => (float[4, 6] y) <float[8, 6] w, float[4, 1] b> { y = Gemm(x, w, b) }",
    "a bias of one number": "g (float[4, 8] x) => (float[4, 6] y) <float[8, 6] w, float[1, 1] b> { y = Gemm(x, w, b) }",
    "a computed bias of a Gemm": (
        "g (float[4, 8] x) => (float[4, 6] y) <float[8, 6] w, float[8, 6] v> { b = MatMul(x, v) y = Gemm(x, w, b) }"
    ),
    "a computed bias of a Conv": (
        """g (float[1, 4, 5, 5] x) => (float[1, 4, 3, 3] y) <float[4, 4, 3, 3] w, float[4, 4] v, int64[1] axis = {0}> {
            p = GlobalAveragePool(x) f = Flatten(p) k = MatMul(f, v) b = Squeeze(k, axis) y = Conv(x, w, b) }"""
    ),
    "a computed bias of a ConvTranspose": (
        """g (float[1, 4, 5, 5] x) => (float[1, 4, 7, 7] y) <float[4, 4, 3, 3] w, float[4, 4] v, int64[1] axis = {0}> {
            p = GlobalAveragePool(x) f = Flatten(p) k = MatMul(f, v) b = Squeeze(k, axis) y = ConvTranspose(x, w, b) }"""
    ),
    "the last state of an LSTM": (
        """g (float[T, 1, 3] x) => (float[1, 1, 4] y) <float[1, 20, 3] w, float[1, 20, 5] r, float[5, 4] v> {
            "", h = LSTM<hidden_size = 5>(x, w, r) y = MatMul(h, v) }"""
    ),
}
SMALL = {
    "joined with a large one": "k = Concat<axis = 1>(l, s) [c1] y = Conv(k, w) [c2] z = Conv(s, v)",
    "joined twice": "k = Concat<axis = 1>(l, s) m = Concat<axis = 1>(s, l) [c0] n = Conv(m, w) [c1] o = Conv(k, w) y = Add(n, o) [c2] z = Conv(s, v)",
    "pooled and joined": "p = MaxPool<kernel_shape = [1, 1]>(s) k = Concat<axis = 1>(l, p) [c1] y = Conv(k, w) [c2] z = Conv(p, v) ",
    "cut out of a large one": "[c1] y = Conv(both, w) c = Slice(both, from, to, axis) [c2] z = Conv(c, v)",
    "split from a large one": "[c1] y = Conv(both, w) a, c = Split<axis = 1>(both, halves) [c0] o = Conv(a, v) [c2] z = Conv(c, v)",
}  # fmt: skip


def quantized_of(text: str, feed: dict[str, np.ndarray], folder: Path, *, fp16: bool = False) -> tuple[dict, dict]:
    """The outputs of a graph with random weights, exact and in INT8."""
    proto = onnx.parser.parse_model(text if text.startswith("<") else f'<ir_version: 10, opset_import: ["": 19]> {text}')
    rng = np.random.default_rng(0)
    for value in proto.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), value.name))
    del proto.graph.value_info[:]
    onnx.save(proto, folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    made = quantize_onnx(artifact, calibration_set(artifact, [feed]), QuantizeOptions(fp16=fp16))
    made.save(folder / "int8.onnx")
    assert made.stored.scales
    return CpuGraph.read(folder / "net.onnx")(feed), CpuGraph.read(folder / "int8.onnx")(feed)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_every_form_are_quantized(name: str, fp16: bool, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]> {GRAPHS[name]}')
    shape = [dim.dim_value or 7 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    exact, quantized = quantized_of(GRAPHS[name], feed, tmp_path, fp16=fp16)
    assert difference(quantized["y"], exact["y"]).sqnr_db > 25


@pytest.mark.parametrize("name", SMALL)
def test_a_small_tensor_keeps_a_scale_of_its_own_where_a_layer_reads_it(name: str, tmp_path: Path) -> None:
    constants = "int64[1] from = {2}, int64[1] to = {4}, int64[1] axis = {1}, int64[2] halves = {2, 2}"
    text = f"""g (float[N, 2, 4, 4] l, float[N, 2, 4, 4] s, float[N, 4, 4, 4] both) => (float[N, 2, 4, 4] y, float[N, 2, 4, 4] z)
        <float[2, 4, 1, 1] w, float[2, 2, 1, 1] v, {constants}> {{ {SMALL[name]} }}"""
    rng = np.random.default_rng(1)
    feed = {name: (rng.standard_normal((4, 2, 4, 4)) * size).astype(np.float32) for name, size in (("l", 200), ("s", 0.3))}
    feed["both"] = np.concatenate([feed["l"], feed["s"]], axis=1)
    exact, quantized = quantized_of(text, feed, tmp_path)
    for output in ("y", "z"):
        assert difference(quantized[output], exact[output]).sqnr_db > 25, output


@pytest.mark.parametrize("opset", [19, 22, 23, 25])
@pytest.mark.parametrize("fp16", [False, True])
def test_every_opset_with_scales_in_fp16_is_quantized(opset: int, fp16: bool, tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["": {opset}]> g (float[N, 4] x) => (float[N, 3] y)
        <float[4, 5] w, float[5, 3] v> {{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }}"""
    feed = {"x": np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)}
    exact, quantized = quantized_of(text, feed, tmp_path, fp16=fp16)
    assert difference(quantized["y"], exact["y"]).sqnr_db > 25


@pytest.mark.parametrize("fp16", [True, False])
def test_where_there_is_nothing_to_quantize_fp16_alone_is_named_if_it_was_asked_for(tmp_path, fp16):
    artifact = net(tmp_path / "net", "y = Relu(x)")
    with pytest.raises(PrecisionError, match="nothing to quantize") as caught:
        quantize_onnx(artifact, data_for(artifact), QuantizeOptions(fp16=fp16))
    assert ("for FP16 alone, leave INT8 out: `deploy convert --fp16`" in str(caught.value)) == fp16
    deploy.convert(artifact, tmp_path / "half", precision="fp16")  # which holds


FAINT = """<ir_version: 10, opset_import: ["": 19]> g (float[N, 4] x) => (float[N, 8] y)
    <float[4, 8] w, float[8, 8] v, float[8, 8] u> {
    [first] h = MatMul(x, w) r = Relu(h) [faint] f = MatMul(r, v) k = Tanh(f) [last] y = MatMul(k, u) }"""


def faint(folder: Path) -> tuple[Artifact, CalibrationSet]:
    """A net whose layer `faint` reads with tiny weights what is large, and with large ones what is small."""
    proto = onnx.parser.parse_model(FAINT)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) for name, shape in (("w", (4, 8)), ("v", (8, 8)), ("u", (8, 8)))}
    arrays["w"][:, 0] *= 2000
    arrays["v"][0] = 0
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    del proto.graph.value_info[:]
    onnx.save(proto, folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    return artifact, calibration_set(artifact, [{"x": rng.standard_normal((64, 4)).astype(np.float32)}])


def test_a_layer_that_loses_too_much_stays_in_floating_point_and_is_listed(tmp_path: Path) -> None:
    artifact, data = faint(tmp_path)
    for _ in ("calibrated", "from the cache"):
        made = quantize_onnx(artifact, data, QuantizeOptions(min_share=40))
        (exclusion,) = made.exclusions
        assert exclusion.node == "faint"
        assert "below 10 (`keep_below`)" in exclusion.reason
        assert [layer.node for layer in made.calibration.layers if layer.node == "faint"] == []
        assert made.calibration.share == pytest.approx(0.6)
    everything = quantize_onnx(artifact, data, QuantizeOptions(keep_below=-100))
    assert (everything.exclusions, everything.calibration.share) == ([], 1.0)


def test_too_little_in_int8_is_an_error_that_says_why(tmp_path: Path) -> None:
    artifact, data = faint(tmp_path)
    with pytest.raises(
        PrecisionError, match=r"INT8 would be 60% of .*; at least 90% .*: faint: its signal to quantization noise is"
    ):
        quantize_onnx(artifact, data, QuantizeOptions())
    assert quantize_onnx(artifact, data, QuantizeOptions(exclude=("faint",))).calibration.share == pytest.approx(0.6)


def test_the_skip_of_a_sum_stays_as_it_is_where_the_layer_that_adds_is_too_noisy(tmp_path: Path) -> None:
    """Without that layer, the sum would be computed in the other one, and the skip be a tensor that was not measured."""
    text = """<ir_version: 10, opset_import: ["": 19]> g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
        [first] a = Conv(x, w) [faint] b = Conv(x, v) s = Add(a, b) y = Relu(s) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal((4, 4, 1, 1)).astype(np.float32) for _ in range(2))
    v[:, 0] = 0  # of what is large, all is lost
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(v, "v")])
    onnx.save(proto, tmp_path / "net.onnx")
    artifact = deploy.open_artifact(tmp_path / "net.onnx")
    x = rng.standard_normal((16, 4, 8, 8)).astype(np.float32)
    x[:, 0] *= 5000
    made = quantize_onnx(artifact, calibration_set(artifact, [{"x": x}]), QuantizeOptions(min_share=40), cpu=True)
    assert [exclusion.node for exclusion in made.exclusions] == ["faint"]
    for model in (made.model, made.cpu.model):
        (total,) = (node for node in model.graph if node.op_type == "Add")
        assert [value.producer().op_type for value in total.inputs] == ["Conv", "Conv"]


PERCEPTRON = """<ir_version: 10, opset_import: ["": 20]> g (float[N, 32] x) => (float[N, 10] y) {
    [first] a = MatMul(x, u) c = Add(a, b) d = Relu(c) [second] e = MatMul(d, v) f = Gelu(e) [head] y = MatMul(f, w) }"""


def perceptron(folder: Path, factor: float = 1.0) -> tuple[Artifact, CalibrationSet, dict[str, np.ndarray]]:
    proto = onnx.parser.parse_model(PERCEPTRON)
    rng = np.random.default_rng(0)
    for name, shape in (("u", (32, 64)), ("b", (64,)), ("v", (64, 64)), ("w", (64, 10))):
        array = (rng.standard_normal(shape) * factor).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    feed = {"x": rng.standard_normal((64, 32)).astype(np.float32)}
    return artifact, calibration_set(artifact, [feed]), feed


@pytest.mark.parametrize(
    "options", [{}, {"method": "auto"}, {"fp16": True}, {"per_tensor": True}, {"method": "percentile"}], ids=str
)
def test_products_are_in_fp8_with_codes_of_fp8(tmp_path: Path, options: dict[str, Any]) -> None:
    artifact, data, feed = perceptron(tmp_path)
    made = quantize_onnx(artifact, data, QuantizeOptions(fp8=True, **options))
    made.save(tmp_path / "fp8.onnx")
    layers = [node for node in made.model.graph if node.op_type == "MatMul"]
    for layer in layers:
        pair, weight = (value.producer() for value in layer.inputs)
        assert [node.inputs[0].dtype for node in (pair, weight)] == [ir.DataType.FLOAT8E4M3FN] * 2
        assert weight.inputs[1].dtype == pair.inputs[1].dtype == (ir.DataType.FLOAT16 if "fp16" in options else ir.DataType.FLOAT)
        assert len(weight.inputs[1].shape) == (0 if "per_tensor" in options else 1)
    assert (len(layers), made.calibration.share, made.exclusions) == (3, 1.0, [])
    assert made.calibration.method == options.get("method", "max")
    assert min(layer.sqnr_db for layer in made.calibration.layers) > 26
    found = CpuGraph.read(tmp_path / "fp8.onnx")(feed)["y"]
    assert difference(found, CpuGraph.read(artifact.onnx_path)(feed)["y"]).sqnr_db > (
        15 if options.get("method") == "percentile" else 23
    )
    again = quantize_onnx(artifact, data, QuantizeOptions(fp8=True, **options))
    assert ir.to_proto(again.model) == ir.to_proto(made.model)  # from the cache


def test_weights_whose_scales_fp16_cannot_hold_are_in_fp8_all_the_same(tmp_path: Path) -> None:
    artifact, data, feed = perceptron(tmp_path, factor=3e-3)
    with pytest.raises(PrecisionError, match="would be subnormal in FP16"):
        quantize_onnx(artifact, data, QuantizeOptions(fp16=True))
    fp8 = quantize_onnx(artifact, data, QuantizeOptions(fp16=True, fp8=True))
    assert fp8.calibration.share == 1
    fp8.save(tmp_path / "fp8.onnx")
    assert difference(CpuGraph.read(tmp_path / "fp8.onnx")(feed)["y"], CpuGraph.read(artifact.onnx_path)(feed)["y"]).sqnr_db > 20


@pytest.mark.parametrize("fp8", [False, True])
def test_an_engine_leaves_what_is_slow_in_it_and_the_share_is_not_held_against_it(
    tmp_path: Path, fp8: bool, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, data, _ = perceptron(tmp_path)
    profile = {"x": ShapeRange(min=(1, 32), opt=(8, 32), max=(8, 32))}
    for _ in ("calibrated", "from the cache"):
        made = quantize_onnx(artifact, data, QuantizeOptions(fp8=fp8, min_share=100), engine=profile)
        (left,) = made.exclusions
        assert (left.node, left.reason[:35]) == ("head", "it adds up or gives fewer than 16 n")
        assert made.calibration.share == pytest.approx(1 - 640 / (640 + 64 * 96))
    included = quantize_onnx(artifact, data, QuantizeOptions(fp8=fp8, include=("head",)), engine=profile)
    assert (included.exclusions, included.calibration.share) == ([], 1.0)
    single = {"x": ShapeRange(min=(1, 32), opt=(1, 32), max=(8, 32))}
    assert quantize_onnx(artifact, data, QuantizeOptions(fp8=fp8), engine=single).exclusions == []  # better than nothing at all
    assert re.search(r"no layer is for (INT8|FP8) in an engine \(first: it multiplies by one vector", caplog.text)
