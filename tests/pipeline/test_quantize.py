"""The stage `quantize` on small real nets and real files."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model
from deploy.data.calibration_set import calibration_set
from deploy.data.image_folder import read_folder
from deploy.errors import AccuracyError, ParityError, PrecisionError, UsageError
from deploy.models import create
from deploy.models.lenet5 import LeNet5
from deploy.pipeline.artifact_cache import QUANTIZED_CACHE
from deploy.precision.int8 import cache as calibration_cache
from deploy.precision.int8 import options
from deploy.precision.int8 import quantize as int8
from deploy.precision.int8.options import METHOD
from deploy.words import printable


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of eight pictures, 28 x 28: bars whose place and width depend on the class, in noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("bars")
    for label in range(10):
        (folder / str(label)).mkdir()
        for index in range(8):
            pixels = rng.integers(0, 60, (28, 28))
            pixels[2 + 2 * label : 6 + 2 * label, 3 : 10 + label] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return deploy.export(tmp_path_factory.mktemp("net") / "convnet", arch="convnet", preprocess="mnist")


def scales(artifact: Artifact) -> dict[str, float]:
    model = onnx.load(artifact.onnx_path)
    made = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {node.input[0]: float(made[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_the_artifact_says_how_it_was_calibrated_and_is_a_quarter_of_the_size(convnet, images, tmp_path):
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images, images=40)
    manifest = made.manifest
    assert manifest.precision == "int8"
    assert manifest.parent is not None
    assert manifest.parent.digest == convnet.manifest.digest
    record = manifest.calibration
    assert record is not None
    assert (record.kind, record.rows, record.method, record.floats) == ("images", 40, METHOD, "fp32")
    assert [layer.node for layer in record.layers] != []
    assert record.layers == sorted(record.layers, key=lambda layer: layer.sqnr_db)
    assert manifest.parity is not None
    assert manifest.parity.worst.sqnr_db > 20
    assert made.size < 0.3 * convnet.size
    onnx.checker.check_model(str(made.onnx_path), full_check=True)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_runs_on_every_backend_and_agrees_with_fp32(convnet, images, tmp_path, backend):
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images)
    feed = next(calibration_set(convnet, images).feeds(16))
    with deploy.load(convnet) as exact, deploy.load(made, backend=backend) as quantized:
        expected, found = exact(feed["input"]), quantized(feed["input"])
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_scales_do_not_depend_on_the_batch(convnet, images, tmp_path, cache, method):
    found = []
    for batch in (1, 7, 32):
        made = deploy.quantize(convnet, tmp_path / f"int8-{batch}", calib=images, method=method, batch_size=batch)
        found.append(scales(made))
        shutil.rmtree(cache)
    assert set(found[0]) == set(found[1]) == set(found[2])
    tolerance = 1e-5 if method == "max" else 2 / 4096  # one bin of the widest range
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=tolerance)


def test_a_second_run_takes_the_calibration_from_the_cache_and_a_changed_image_or_program_does_not(
    convnet, images, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    first = deploy.quantize(convnet, tmp_path / "a", calib=images, images=20)
    second = deploy.quantize(convnet, tmp_path / "b", calib=images, images=20)
    assert "the same quantized artifact was made before" in caplog.text
    assert first.onnx_path.read_bytes() == second.onnx_path.read_bytes()
    assert first.manifest.parity == second.manifest.parity
    caplog.clear()
    deploy.quantize(convnet, tmp_path / "a", calib=images, images=20)
    assert "up to date" in caplog.text
    caplog.clear()
    deploy.quantize(convnet, tmp_path / "c", calib=images, images=21)
    deploy.quantize(convnet, tmp_path / "d", calib=images, images=20, method="max")
    monkeypatch.setattr(options, "REVISION", options.REVISION + 1)
    deploy.quantize(convnet, tmp_path / "e", calib=images, images=20)
    assert "was made before" not in caplog.text
    assert "calibration found" not in caplog.text


def test_an_engine_takes_the_calibration_that_quantize_has_kept(convnet, images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = deploy.quantize(convnet, tmp_path / "a", calib=images, images=20)
    engine = deploy.build_trt(convnet, tmp_path / "engine", int8=True, calib=images, images=20)
    assert "calibration found" in caplog.text
    kept = scales(engine)
    assert kept == {tensor: scale for tensor, scale in scales(first).items() if tensor in kept}
    assert len(kept) == len(scales(first)) - 1  # what the last layer reads: it gives ten numbers


def test_a_damaged_cache_is_made_again(convnet, images, tmp_path):
    first = deploy.quantize(convnet, tmp_path / "a", calib=images, images=20)
    (path,) = calibration_cache.folder().iterdir()
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(QUANTIZED_CACHE.folder)
    assert (
        deploy.quantize(convnet, tmp_path / "b", calib=images, images=20).onnx_path.read_bytes() == first.onnx_path.read_bytes()
    )


def test_interrupted_and_started_again_it_ends_with_the_same_scales(convnet, images, tmp_path):
    whole = deploy.quantize(convnet, tmp_path / "whole", calib=images, images=64)
    shutil.rmtree(calibration_cache.folder().parent)
    program = (
        "import os, signal, sys, deploy\n"
        "def stop(what, done=0, total=0):\n"
        "    if what == 'calibrating' and done >= 16: os.kill(os.getpid(), signal.SIGKILL)\n"
        "deploy.quantize(sys.argv[1], sys.argv[2], calib=sys.argv[3], images=64, progress=stop)\n"
    )
    arguments = [str(convnet.path), str(tmp_path / "again"), str(images)]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "again").exists()
    assert scales(deploy.quantize(convnet, tmp_path / "again", calib=images, images=64)) == scales(whole)


def test_bias_correction_takes_the_mean_error_of_the_layers_away(convnet, images, tmp_path):
    """On the calibration data itself, in the layers' own outputs: the first one has the same input in both graphs."""
    feed = {"input": np.concatenate([feed["input"] for feed in calibration_set(convnet, images, 8).feeds(8)])}

    def first_layer(artifact: Artifact) -> np.ndarray:
        model = onnx.load(artifact.onnx_path)
        node = next(node for node in model.graph.node if node.op_type == "Conv")
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run([node.output[0]], feed)[0]

    exact = first_layer(convnet)
    left = {
        corrected: np.abs(
            (first_layer(deploy.quantize(convnet, tmp_path / str(corrected), calib=images, images=8, bias_correction=corrected)) - exact)
            .mean(axis=(0, 2, 3))
        ).max()
        for corrected in (False, True)
    }  # fmt: skip
    assert left[True] < 0.05 * left[False]


def test_with_fp16_the_rest_is_fp16_without_casts_between_layers(convnet, images, tmp_path):
    made = deploy.quantize(convnet, tmp_path / "mixed", calib=images, fp16=True)
    model = onnx.load(made.onnx_path)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    assert len(casts) == 2
    assert all(ends & {*node.input, *node.output} for node in casts)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.FLOAT not in types
    assert made.manifest.calibration.floats == "fp16"
    assert made.manifest.parity.worst.sqnr_db > 20


def test_excluded_nodes_stay_in_floating_point_and_are_listed(convnet, images, tmp_path):
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images, exclude=["Gemm"])
    assert {exclusion.reason for exclusion in made.manifest.exclusions} == {"excluded by 'Gemm'"}
    weights = {t.name: t.data_type for t in onnx.load(made.onnx_path).graph.initializer if len(t.dims) == 2}
    assert set(weights.values()) == {onnx.TensorProto.FLOAT}
    with pytest.raises(PrecisionError, match=r"'Gem' matches no node.*did you mean 'Gemm'"):
        deploy.quantize(convnet, tmp_path / "other", calib=images, exclude=["Gem"])


def test_a_gate_that_is_not_met_names_the_layers_and_writes_nothing(convnet, images, tmp_path, monkeypatch):
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images, eval_folder=images, max_drop=100)
    accuracy = made.manifest.accuracy
    assert accuracy is not None
    assert accuracy.images == 80
    assert accuracy.top1_drop == pytest.approx(accuracy.parent_top1 - accuracy.top1)
    assert accuracy.top1_drop_low <= accuracy.top1_drop <= accuracy.top1_drop_high

    def ruined(histogram, method, *, percentile):
        return histogram.amax / 50

    trained = _trained(images, tmp_path)
    monkeypatch.setattr(int8, "threshold", ruined)
    with pytest.raises(AccuracyError, match=r"loses .* points of top-1 .*at most 1 are allowed") as caught:
        limits = {"method": "percentile", "rtol": 100, "min_cosine": -1, "min_sqnr": -100, "keep_below": -100}
        deploy.quantize(trained, tmp_path / "bad", calib=images, eval_folder=images, **limits)
    assert "dB" in str(caught.value)
    assert not (tmp_path / "bad").exists()


def _trained(images: Path, tmp_path: Path) -> Artifact:
    """A lenet5 that knows the bars."""
    torch.manual_seed(0)
    net = LeNet5(num_classes=10)
    feeds = calibration_set(deploy.export(tmp_path / "blank", arch="lenet5", preprocess="mnist"), images).feeds(80)
    x = torch.from_numpy(next(feeds)["input"])
    labels = torch.tensor([label for _, label in read_folder(images).sample(512)])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert (net(x).argmax(1) == labels).float().mean() > 0.95
    torch.save(net.state_dict(), tmp_path / "bars.pth")
    return deploy.export(tmp_path / "bars", arch="lenet5", weights=tmp_path / "bars.pth", preprocess="mnist")


def test_a_result_that_is_far_off_is_refused_with_the_noisiest_layers(convnet, images, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "threshold", lambda histogram, method, *, percentile: histogram.amax / 1000)
    with pytest.raises(ParityError, match=r"(?s)in INT8.*nothing was written.*most sensitive layers"):
        deploy.quantize(convnet, tmp_path / "bad", calib=images, images=16, method="percentile", keep_below=-100)
    assert not (tmp_path / "bad").exists()


def test_several_inputs_are_calibrated_on_feeds(tmp_path):
    net = deploy.export(tmp_path / "net", arch="rangeseg", inputs=["distance=1x1x32x64", "intensity=1x1x32x64"])
    rng = np.random.default_rng(0)
    feeds = [
        {name: rng.random((2, 1, 32, 64), dtype=np.float32) for name in ("distance", "intensity")} for _ in range(4)
    ]  # fmt: skip
    (tmp_path / "feeds").mkdir()
    for index, feed in enumerate(feeds):
        np.savez(tmp_path / "feeds" / f"{index}.npz", **feed)
    of_files = deploy.quantize(net, tmp_path / "a", calib=tmp_path / "feeds")
    of_memory = deploy.quantize(net, tmp_path / "b", calib=iter(feeds))
    assert scales(of_files) == scales(of_memory)
    assert of_files.manifest.calibration.rows == 8
    assert of_files.manifest.parity.cases[0].data == "feeds"
    assert of_memory.manifest.calibration.data is None


def test_a_dead_activation_is_said_and_harmless(tmp_path, caplog):
    feeds = [{"input": np.zeros((2, 1, 28, 28), np.float32)}]
    net = deploy.export(tmp_path / "net", arch="lenet5")
    made = deploy.quantize(net, tmp_path / "int8", calib=feeds)
    assert "always 0 on the calibration data: input" in caplog.text
    with deploy.load(made) as session:
        assert np.isfinite(session(np.zeros((1, 1, 28, 28), np.float32))).all()


def test_only_an_fp32_onnx_artifact_can_be_quantized(convnet, images, tmp_path):
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images, images=16)
    with pytest.raises(UsageError, match="is int8 already"):
        deploy.quantize(made, tmp_path / "twice", calib=images)
    with pytest.raises(UsageError, match="is int8 already"):
        deploy.quantize(made.onnx_path, tmp_path / "twice", calib=images)
    with pytest.raises(UsageError, match="at least one feed"):
        deploy.quantize(convnet, tmp_path / "none", calib=[])


@pytest.mark.parametrize("counters", [True, False])
def test_features_of_another_code_bases_mobilenet_go_from_its_checkpoint_to_int8_by_order(images, tmp_path, counters):
    """All its names are opaque; of its classifier the feature net takes the first tensors."""
    torch.manual_seed(0)
    net = create("mobilenet_v1", num_classes=5, width=0.25)
    with torch.no_grad():
        net(torch.rand(16, 3, 32, 32))  # statistics, and counters that are not 0
    state = {f"v{n}": tensor for n, tensor in enumerate(net.state_dict().values()) if counters or tensor.dim()}
    torch.save({"epoch": torch.tensor(90), "learner": {"params": state}}, tmp_path / "foreign.pth.tar")
    made = deploy.export(
        tmp_path / "features",
        arch="mobilenet_v1_features",
        model_args={"width": 0.25},
        weights=tmp_path / "foreign.pth.tar",
        match="order",
        inputs=["input=1x3x32x32"],
        preprocess="none",
    )
    x = np.random.default_rng(1).random((4, 3, 32, 32), dtype=np.float32)
    expected = []
    maps = torch.from_numpy(x)
    with torch.no_grad():
        for stage in net.eval().model[:7]:
            maps = stage(maps)
            expected.append(maps.numpy())
    quantized = deploy.quantize(made, tmp_path / "int8", calib=images, images=40)
    assert quantized.manifest.precision == "int8"
    for artifact, least in ((made, 0.99999), (quantized, 0.98)):
        with deploy.load(artifact) as session:
            found = list(session.run({"input": x}).values())
        assert len(found) == 7
        for ours, theirs in zip(found, expected, strict=True):
            assert np.vdot(ours, theirs) > least * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_a_skipped_image_whose_name_is_not_utf8_is_recorded(convnet, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    odd = tmp_path / "images" / "0" / os.fsdecode(b"caf\xe9.png")
    try:
        odd.write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    made = deploy.quantize(convnet, tmp_path / "int8", calib=tmp_path / "images")
    assert made.manifest.calibration is not None
    assert made.manifest.calibration.skipped == [printable(odd)]
    assert Artifact.open(made.path).manifest == made.manifest


def test_a_deeplab_goes_from_a_checkpoint_to_int8(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models.segmentation
    net = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "deeplab.pth")
    exported = deploy.export(
        tmp_path / "deeplab",
        arch="torchvision:deeplabv3_mobilenet_v3_large",
        weights=tmp_path / "deeplab.pth",
        model_args={"aux_loss": True},
        inputs=["input=1x3x32x32"],
    )
    rng = np.random.default_rng(0)
    feeds = [{"input": rng.standard_normal((1, 3, 32, 32), dtype=np.float32)} for _ in range(4)]
    artifact = deploy.quantize(exported, tmp_path / "int8", calib=feeds)
    assert [(spec.name, spec.shape[1:]) for spec in artifact.manifest.outputs] == [("logits", (3, 32, 32)), ("aux", (3, 32, 32))]
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.worst.cosine is not None
    assert artifact.manifest.parity.worst.cosine > 0.999
    graph = load_model(artifact.onnx_path).graph
    convolutions = [node for node in graph if node.op_type == "Conv"]
    quantized = [node for node in convolutions if getattr(node.inputs[1].producer(), "op_type", "") == "DequantizeLinear"]
    assert len(quantized) > 60
    assert len(quantized) > 0.9 * len(convolutions)
