"""What is smoothed, and that it pays."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import deploy
from deploy.data.calibration_set import calibration_set
from deploy.evidence.parity import difference
from deploy.precision.codes import INT8
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8 import quantize
from deploy.precision.int8.channels import choose_channels
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.smooth import Channels
from tests.precision.conftest import prepare

SIZE = 32
BODIES = {
    "norm": "h = LayerNormalization(x, g, s) m = MatMul(h, w) y = Add(m, b)",
    "norm that a sum reads too": "h = LayerNormalization(x, g, s) m = MatMul(h, w) y = Add(m, h)",
    "norm behind a Concat": "h = LayerNormalization(x, g, s) c = Concat<axis = 0>(h, h) m = MatMul(c, w) y = Add(m, b)",
    "activation": "k = Mul(x, g) h = Gelu(k) m = MatMul(h, w) y = Add(m, b)",
    "input": "y = Gemm(x, u, b)",
    "even": "y = MatMul(x, w)",
    "convolved": "h = Conv(i, k) y = MatMul(h, n)",
    "clipped": "k = Mul(x, g) h = Relu(k) y = MatMul(h, w)",
    "read along another axis": "t = Transpose<perm = [1, 0]>(x) y = MatMul(x, t)",
}


def net(body: str) -> onnx.ModelProto:
    """A net with matrices of SIZE x SIZE whose g and s make two channels of 32 fifty times as large as the others."""
    wide = "float[1, 3, 4, 8] i" if "(i" in body else f"float[N, {SIZE}] x"
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({wide}) => (float[] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) for name, shape in (("w", (SIZE, SIZE)), ("b", SIZE), ("s", SIZE), ("g", SIZE))}
    arrays |= {"k": rng.standard_normal((3, 3, 1, 1)), "n": rng.standard_normal((8, 5))}
    arrays["g"] = np.abs(arrays["g"]) + 0.5
    arrays["u"] = arrays["w"] * np.where(np.arange(SIZE) == 3, 0.01, 1)[:, None]
    arrays["s"][5] = arrays["g"][7] = 50
    for name, array in arrays.items():
        if any(name in node.input for node in model.graph.node) and not any(name in node.output for node in model.graph.node):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return onnx.shape_inference.infer_shapes(model)


def rows(body: str, count: int = 32) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    if "(i" in body:
        return [{"i": rng.standard_normal((1, 3, 4, 8)).astype(np.float32)} for _ in range(count)]
    x = rng.standard_normal((count, SIZE)).astype(np.float32)
    if body == BODIES["input"]:
        x[:, 3] *= 100
    return [{"x": x[index : index + 1]} for index in range(count)]


def chosen(body: str, count: int = 32, **options: bool) -> dict[str, Channels]:
    graph = ir.from_proto(prepare(net(body), opset=20))
    placement = place(graph, Selection())
    return choose_channels(graph, placement, iter(rows(body, count)), INT8, **{"per_tensor": False, "corrected": True, **options})


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["norm", "norm that a sum reads too", "norm behind a Concat", "activation", "input"])
def test_channels_of_different_ranges_are_smoothed(name: str, per_tensor: bool, corrected: bool) -> None:
    found = chosen(BODIES[name], per_tensor=per_tensor, corrected=corrected)
    (channels,) = found.values()
    assert channels.scale.max() > 5 * np.median(channels.scale)
    assert (channels.scale > 0).all()


@pytest.mark.parametrize("name", ["even", "convolved", "clipped", "read along another axis"])
def test_what_gains_nothing_or_is_no_layer_with_channels_stays_as_it_is(name: str) -> None:
    assert chosen(BODIES[name]) == {}


@pytest.mark.parametrize(("count", "smoothed"), [(0, False), (1, False), (15, False), (64, True)])
def test_too_few_vectors_say_nothing_of_the_ranges(count: int, smoothed: bool) -> None:
    assert set(chosen(BODIES["norm"], count)) == ({"h"} if smoothed else set())


def test_dead_channels_are_left_alone() -> None:
    body = BODIES["norm"]
    model = net(body)
    for tensor in model.graph.initializer:
        if tensor.name in ("g", "s", "w"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[:2] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    graph = ir.from_proto(prepare(model, opset=20))
    channels = choose_channels(graph, place(graph, Selection()), rows(body), INT8, per_tensor=False, corrected=True)["h"]
    assert channels.scale[:2].tolist() == [1, 1]
    assert np.isfinite(channels.scale).all()


def test_vectors_of_zeros_which_padding_makes_do_not_judge() -> None:
    data = rows(BODIES["activation"], 64)
    for row in (data[index] for index in range(64) if index % 16 in (3, 7, 11)):  # of every four that judge, one is left
        row["x"][:] = 0
    graph = ir.from_proto(prepare(net(BODIES["activation"]), opset=20))
    assert set(choose_channels(graph, place(graph, Selection()), data, INT8, per_tensor=False, corrected=True)) == {"h"}


def sqnr(body: str, folder: Path, *, fp16: bool, batch_size: int = 2) -> float:
    onnx.save(net(body), folder / "net.onnx")
    artifact = deploy.open_artifact(folder / "net.onnx")
    feed = {name: np.concatenate([row[name] for row in rows(body, 64)]) for name in rows(body, 1)[0]}
    options = QuantizeOptions(method="max", fp16=fp16, batch_size=batch_size, keep_below=-100)
    made = quantize.quantize_onnx(artifact, calibration_set(artifact, [feed]), options)
    made.save(folder / "int8.onnx")
    exact, found = (CpuGraph.read(folder / name)(feed)["y"] for name in ("net.onnx", "int8.onnx"))
    result = difference(found, exact).sqnr_db
    assert result is not None
    return result


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", ["norm", "norm that a sum reads too", "norm behind a Concat", "activation", "input"])
def test_the_file_gains_by_it(name: str, fp16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "with"))
    smoothed = sqnr(BODIES[name], tmp_path, fp16=fp16)
    monkeypatch.setattr(quantize, "choose_channels", lambda *_, **__: {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "without"))
    assert smoothed > sqnr(BODIES[name], tmp_path, fp16=fp16) + 3


def test_the_file_does_not_depend_on_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for batch_size in (1, 7, 64):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(batch_size)))
        sqnr(BODIES["norm"], tmp_path, fp16=False, batch_size=batch_size)
        weights = onnx.load(tmp_path / "int8.onnx").graph.initializer
        written.append(
            {tensor.name: tensor.raw_data for tensor in weights if "smoothed" in tensor.name or tensor.name == "h_scale"}
        )
    assert written[0]
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_what_attention_gives_is_not_scaled_where_a_weight_has_one_scale(per_tensor: bool, build) -> None:
    model = build(
        """g (float[N, 6, 8] x) => (float[] y) <float[8, 8] v, float[8, 8] w> {
            [value] a = MatMul(x, v) t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t) p = Softmax(s) h = MatMul(p, a) y = MatMul(h, w) }"""
    )
    for tensor in model.graph.initializer:
        if tensor.name == "v":
            wide = onnx.numpy_helper.to_array(tensor) * np.where(np.arange(8) == 3, 50, 1).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, "v"))
    graph = ir.from_proto(model)
    data = ({"x": row} for row in np.random.default_rng(1).standard_normal((64, 1, 6, 8)).astype(np.float32))
    found = choose_channels(graph, place(graph, Selection()), data, INT8, per_tensor=per_tensor, corrected=True)
    ones = np.ones(8, np.float32)
    scale = found["h"].scale if "h" in found else ones
    assert (scale.max() == 1) if per_tensor else (scale[3] > 5 * np.median(scale))


MAP = "g (float[N, 8, 12, 12] x) => (float[] y) <float[16, 8, 1, 1] u, float[8, 16, 1, 1] w, float[8, 16, 3, 3] v> {{ a = Conv(x, u) s = Sigmoid(a) {} }}"
SILU = "h = Mul(a, s) y = Conv(h, w)"


def maps(model: onnx.ModelProto, *, outlier: float = 1.0) -> dict[str, Channels]:
    graph = ir.from_proto(model)
    x = np.random.default_rng(1).standard_normal((64, 8, 12, 12)).astype(np.float32)
    x[30, :, 0, 0] *= outlier
    data = ({"x": x[index : index + 1]} for index in range(64))
    return choose_channels(graph, place(graph, Selection()), data, INT8, per_tensor=False, corrected=True)


def test_one_number_is_taken_off_what_a_convolution_of_one_by_one_reads_behind_an_activation(build) -> None:
    (channels,) = maps(build(MAP.format(SILU))).values()
    assert (channels.scale == 1).all()
    assert (channels.shift == channels.shift[0]).all()
    assert 1 < channels.shift[0] < 10


def test_a_few_large_numbers_which_calibration_cuts_off_do_not_move_it(build) -> None:
    shift, moved = (maps(build(MAP.format(SILU)), outlier=outlier)["h"].shift[0] for outlier in (1, 100))
    assert moved < 1.5 * shift


@pytest.mark.parametrize(
    "body",
    [
        "h = Relu(a) y = Conv(h, w)",
        "h = Mul(a, s) y = Conv<pads = [1, 1, 1, 1]>(h, v)",
        "h = Mul(a, s) y = Conv<pads = [1, 1, 1, 1]>(h, w)",
        "h = Mul(a, s) p = Conv(h, w) y = GlobalAveragePool(h)",
        "t = Tanh(a) h = Mul(t, s) y = Conv(h, w)",
    ],
)  # fmt: skip
def test_other_convolutions_read_what_they_did(body: str, build) -> None:
    assert maps(build(MAP.format(body))) == {}


PLANTED = """
import torch
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

def swin():
    net = SwinTransformer([4, 4], 32, [2], [2], [4, 4], num_classes=10)
    pairs = [pair for block in net.features[1] for pair in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp[0]))]
    return planted(net, [*pairs, (net.norm, net.head)])

def convnext():
    net = ConvNeXt([CNBlockConfig(32, None, 2)], num_classes=10, layer_scale=0.3)
    return planted(net, [*((block.block[2], block.block[3]) for block in net.features[1]), (net.classifier[0], net.classifier[2])])

def planted(net, pairs):
    with torch.no_grad():
        for norm, layer in pairs:  # three channels of each norm at 100 to 1000 times the others; the layer behind makes up for it
            channels, factors = torch.randperm(norm.weight.numel())[:3], torch.tensor([100.0, 300.0, 1000.0])
            norm.bias += 0.3 * torch.randn_like(norm.bias)
            norm.weight[channels] *= factors
            norm.bias[channels] *= factors
            layer.weight[:, channels] /= factors
    return net
"""


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_nets_with_planted_outlier_channels_keep_25_dB(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "planted.py").write_text(PLANTED)
    source = deploy.export(tmp_path / name, model=f"{tmp_path / 'planted.py'}:{name}", inputs=["input=1x3x40x40"])
    images = np.random.default_rng(0).standard_normal((48, 3, 40, 40)).astype(np.float32)
    data = calibration_set(source, [{"input": images[:32]}])
    made = quantize.quantize_onnx(source, data, QuantizeOptions())
    made.save(tmp_path / "int8.onnx")
    exact, found = (CpuGraph.read(path)({"input": images[32:]})["output"] for path in (source.onnx_path, tmp_path / "int8.onnx"))
    usual = exact.mean(axis=0)  # the part of the output that depends on the image is judged
    result = difference(found - usual, exact - usual).sqnr_db
    assert result is not None
    assert result >= 25
    assert made.calibration.share == 1
