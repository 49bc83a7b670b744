"""The parts of quantization together, on artifacts in memory; what the stage makes of it is in tests/pipeline/test_quantize.py."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Calibration, LayerNoise
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.errors import PrecisionError
from deploy.precision.int8 import quantize as int8
from deploy.precision.int8.equalize import Equalize
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import hint, quantize_onnx

PAIR = "h = Conv(x, w) r = Relu(h) y = Conv(r, v)"
APART = "h = Conv(x, w) r = Sigmoid(h) y = Conv(r, v)"  # a Sigmoid does not commute with a scale
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
    spread = np.array([1, 30]).reshape(2, 1, 1, 1)
    for name, shape in {"w": (2, 2, 1, 1), "v": (2, 2, 1, 1), "d": (2, 1, 1, 1), "o": (2, 2, 1, 1)}.items():
        if any(name in node.input for node in proto.graph.node):
            array = (rng.uniform(0.5, 1, shape) * spread).astype(np.float32)
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

    monkeypatch.setattr(int8, "Equalize", Wrong)
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
