"""Scales from ranges, and shifts of activations on one side of zero."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import METHODS, threshold
from deploy.data.calibration_set import calibration_set
from deploy.evidence.parity import difference
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8 import scales
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.quantize import Quantized, quantize_onnx
from deploy.precision.int8.scales import scales_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


NETS = {
    "MatMul and Add": "h = MatMul(x, w) [act] g = Gelu(h) m = MatMul(g, v) y = Add(m, b)",
    "MatMul alone": "h = MatMul(x, w) [act] g = Gelu(h) y = MatMul(g, v)",
    "Gemm": "h = MatMul(x, w) [act] g = Gelu(h) y = Gemm(g, v, b)",
    "Gemm, transposed": "h = MatMul(x, w) [act] g = Gelu(h) y = Gemm<transB = 1>(g, v)",
    "SiLU in steps": "h = MatMul(x, w) s = Sigmoid(h) [act] g = Mul(h, s) y = MatMul(g, v)",
    "two readers": "h = MatMul(x, w) [act] g = HardSwish(h) m = MatMul(g, v) n = Gemm(g, w, b) y = Add(m, n)",
}


def quantized(body: str, folder: Path, *, fp16: bool = False) -> tuple[Quantized, float]:
    """A net of matrices of 16 x 16 in INT8, and the signal to noise of its file in dB."""
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[N, 16] x) => (float[N, 16] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (16, 16)), ("v", (16, 16)), ("b", (16,))):
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(proto, folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    feed = {"x": rng.standard_normal((64, 16)).astype(np.float32)}
    made = quantize_onnx(artifact, calibration_set(artifact, [feed]), QuantizeOptions(method="max", fp16=fp16))
    made.save(folder / "int8.onnx")
    exact, found = (CpuGraph.read(folder / name)(feed)["y"] for name in ("net.onnx", "int8.onnx"))
    sqnr = difference(found, exact).sqnr_db
    assert sqnr is not None
    return made, sqnr


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_what_lies_above_zero_is_shifted_before_it_is_rounded(
    name: str, fp16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, shifted = quantized(NETS[name], tmp_path, fp16=fp16)
    assert made.stored.shifts["g"] > 1
    monkeypatch.setattr(scales, "SMOOTH", frozenset())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # the calibration is made again
    plain, unshifted = quantized(NETS[name], tmp_path, fp16=fp16)
    assert not plain.stored.shifts
    assert made.stored.scales["g"] < 0.6 * plain.stored.scales["g"]
    assert shifted > unshifted


@pytest.mark.parametrize("name", NETS)
def test_without_its_rounding_a_shifted_file_is_exact(name: str, tmp_path: Path) -> None:
    made, _ = quantized(NETS[name], tmp_path)
    model = ir.load(tmp_path / "int8.onnx")
    made.stored.unround(model)
    feed = {"x": np.random.default_rng(5).standard_normal((8, 16)).astype(np.float32)}
    np.testing.assert_allclose(CpuGraph(model)(feed)["y"], CpuGraph.read(tmp_path / "net.onnx")(feed)["y"], atol=1e-3)


@pytest.mark.parametrize(
    "body",
    [
        "h = Conv(x, u) g = HardSwish(h) y = Conv<pads = [1, 1, 1, 1]>(g, k)",  # zeros around it
        "h = Conv(x, u) g = HardSwish(h) p = GlobalAveragePool(g) y = Conv(p, u)",
        "h = Conv(x, u) g = Relu(h) f = Flatten(g) y = Gemm(f, m)",  # computed inside the Conv
        "h = Conv(x, u) g = HardSwish(h) c = Concat<axis = 1>(g, x) y = Conv(c, d)",
        "h = Conv(x, u) g = Tanh(h) f = Flatten(g) y = Gemm(f, m)",
    ],
)
def test_other_readers_and_numbers_on_both_sides_are_not_shifted(build: Callable[[str], onnx.ModelProto], body: str) -> None:
    model = ir.from_proto(
        build(
            f"""g (float[N, 4, 3, 3] x) => (float[] y)
            <float[4, 4, 1, 1] u, float[4, 4, 3, 3] k, float[4, 8, 1, 1] d, float[36, 5] m> {{ {body} }}"""
        )
    )
    placement = place(model, Selection())
    rng = np.random.default_rng(0)
    histograms = {tensor: Histogram() for tensor in placement.edges}
    for name, histogram in histograms.items():
        values = rng.standard_normal(1000).astype(np.float32)
        histogram.add(np.maximum(values, -0.17) if name in ("g", "f", "p") and "Tanh" not in body else values)
    found = scales_of(model, placement, histograms, {name: histogram.amax for name, histogram in histograms.items()})
    assert found.shifts == {}


@pytest.mark.parametrize("zeros", [1_000, 1_000_000])
@pytest.mark.parametrize("others", [1, 8, 100])
def test_a_few_numbers_among_zeros_are_not_clipped_away(zeros: int, others: int) -> None:
    """As in a map with an impulse."""
    values = np.zeros(zeros + others, np.float32)
    values[:: zeros // others][:others] = np.linspace(1, 1.5, others)
    histogram = Histogram()
    histogram.add(values)
    for method in METHODS:
        assert threshold(histogram, method) >= 0.98 * values.max()
