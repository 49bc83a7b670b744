"""`deploy quantize` and `deploy build-trt --int8` as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Ten classes of two pictures of noise."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "digits" / str(label)).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "digits" / str(label) / f"{index}.png")
    return tmp_path / "digits"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return deploy.export(tmp_path_factory.mktemp("net") / "lenet5", arch="lenet5", preprocess="mnist")


def test_the_newest_fp32_artifact_is_quantized_to_its_name(
    run: Run, net: Artifact, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("export", "--arch", "lenet5", "--preprocess", "mnist")
    done = run("quantize", "--calib", digits, "--eval", digits, "--max-drop", "100")
    assert done.status == 0, done.err
    assert "using build/lenet5" in done.err
    assert done.out.startswith("build/lenet5-int8: ONNX, int8")
    assert "calibrated auto over 20 images" in done.out
    assert "(95 % interval of the loss" in done.out
    manifest = json.loads(run("inspect", "build/lenet5-int8", "--json").out)
    assert manifest["precision"] == "int8"
    assert manifest["accuracy"]["images"] == 20
    assert manifest["calibration"]["layers"][0]["node"]


def test_engines_are_built_in_int8_alone_and_with_fp16_and_of_a_quantized_artifact(
    run: Run, net: Artifact, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, name in ((["--int8"], "int8"), (["--int8", "--fp16"], "int8-fp16")):
        done = run("build-trt", net.path, *options, "--calib", digits)
        assert done.status == 0, done.err
        assert done.out.startswith(f"build/lenet5-{name}-trt: tensorrt-rtx")
        assert "71.6% int8" in done.out
        assert "not INT8   conv1/Conv: it has too few channels for TensorRT's INT8 kernels" in done.out
    done = run("build-trt", net.path, "--int8", "--calib", digits, "--include", "conv1", "--include", "fc3", "-o", "all")
    assert "100.0% int8 of the multiply-accumulates" in done.out, done.err
    assert run("quantize", net.path, "--calib", digits, "-o", "quantized").status == 0
    done = run("build-trt", "quantized", "-o", "engine")
    assert "100.0% int8" in done.out, done.err
    assert json.loads(run("inspect", "engine", "--json").out)["calibration"]["rows"] == 20


def test_a_net_of_products_is_quantized_and_built_in_fp8(
    run: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch.nn import Flatten, Linear, ReLU, Sequential\n"
        "def mlp():\n"
        "    return Sequential(Flatten(), Linear(784, 256), ReLU(), Linear(256, 128), ReLU(), Linear(128, 10))\n"
    )
    exported = run("export", "--model", "net.py:mlp", "--input", "input=1x1x28x28", "--preprocess", "mnist", "--name", "mlp")
    assert exported.status == 0, exported.err
    done = run("quantize", "build/mlp", "--fp8", "--calib", digits, "--eval", digits, "--max-drop", "100")
    assert done.status == 0, done.err
    assert done.out.startswith("build/mlp-fp8: ONNX, fp8,")
    assert done.out.count("; FP8: 100.0% of the multiply-accumulates of layers with weights") == 3  # two backends
    assert not Path("build/mlp-fp8/model.cpu.onnx").exists()
    for backend in ("onnxruntime", "openvino"):
        done = run("eval", "build/mlp-fp8", digits, "--backend", backend)
        assert done.status == 0, done.err
    done = run("build-trt", "build/mlp", "--fp8", "--fp16", "--calib", digits)
    assert done.out.startswith("build/mlp-fp8-fp16-trt: tensorrt-rtx"), done.err
    assert "compute capability 8.9, 12.0" in done.out
    assert "% fp8, " in done.out
    assert json.loads(run("inspect", "build/mlp-fp8-fp16-trt", "--json").out)["precision_share"]["fp8"] > 0.98
    assert run("build-trt", "build/mlp-fp8", "-o", "engine").out.count("100.0% fp8") == 1
    for source in ("mlp", "mlp-fp8"):
        done = run("build-trt", f"build/{source}", "--fp8", "--calib", digits, "--target", "8.6")
        assert (done.status, "--target 8.6: FP8 needs compute capability 8.9" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 2, "--calib"),
        (("--calib", "missing"), 1, "no folder at missing"),
        (("--calib", "empty"), 1, "empty holds no images"),
        (("--calib", "digits", "--images", "0"), 2, "1 or more"),
        (("--calib", "digits", "--method", "least"), 2, "max, percentile, mse, entropy"),
        (("--calib", "digits", "--max-drop", "1"), 2, "--eval"),
        (("--calib", "digits", "--fp8", "--method", "mse"), 2, "--method mse counts the steps of INT8"),
        (("--calib", "digits", "--fp8", "--no-cpu-form"), 2, "--no-cpu-form is of INT8 alone"),
        (("--calib", "digits", "--fp8"), 1, "conv2/Conv: FP8 is for Gemm and MatMul with weights"),
        (("--calib", "digits", "--exclude", "conv3"), 1, "did you mean 'conv2'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    run: Run,
    net: Artifact,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    done = run("quantize", net.path, *args, "-o", "out")
    assert done.status == status, done.err
    assert message in done.err
    assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_options_of_quantization_go_with_int8(run: Run, net: Artifact, tmp_path: Path) -> None:
    done = run("build-trt", net.path, "--calib", tmp_path, "-o", tmp_path / "out")
    assert done.status == 2
    assert "--calib and --images need --int8" in done.err
    done = run("build-trt", net.path, "--int8", "-o", tmp_path / "out")
    assert done.status == 2
    assert "--calib IMAGEFOLDER" in done.err
