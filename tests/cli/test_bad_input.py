"""Bad input: a clear error of one or two lines, exit status 1 or 2, and nothing lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST
from deploy.errors import InputError
from tests.cli.helpers import refused

Run = Callable[..., Any]


def test_an_unknown_backend(run: Run, lenet5: Artifact, images: Path) -> None:
    refused(run("predict", lenet5.path, images, "--backend", "onnxruntme"), 2, "onnxruntme", "onnxruntime")
    refused(run("bench", lenet5.path, "--backend", "onnxruntme"), 2, "onnxruntme", "onnxruntime")


def test_an_output_directory_that_is_not_ours(run: Run, lenet5: Artifact, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    for command in (
        ("export", "--arch", "mlp"),
        ("export", "--onnx", lenet5.onnx_path),
        ("convert", lenet5.path, "--fp16"),
        ("build-trt", lenet5.path),
    ):
        refused(run(*command, "-o", foreign), 1, "not an artifact of deploy")
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]


def test_an_output_that_is_holds_or_lies_in_its_source_is_refused(run: Run, lenet5: Artifact, tmp_path: Path) -> None:
    half = tmp_path / "half"
    assert run("convert", lenet5.path, "--fp16", "-o", half).status == 0
    (tmp_path / "link").symlink_to(tmp_path)
    for source in (lenet5.path, half, lenet5.onnx_path):
        for out in (lenet5.path, lenet5.path / "inner", tmp_path / "link" / lenet5.path.name):
            if source == lenet5.onnx_path and out.name == "inner":
                continue
            for command in ("build-trt", "export --onnx"):
                if command == "export --onnx" and source != lenet5.onnx_path:
                    continue
                refused(run(*command.split(), source, "-o", out), 1, "choose another -o")
    refused(run("convert", lenet5.path, "--fp16", "-o", lenet5.path), 1, "choose another -o")
    assert Artifact.open(lenet5.path) == lenet5
    lenet5.verify()
    assert Artifact.open(half).root().manifest == lenet5.manifest


def test_a_damaged_source_is_found_where_the_output_stands_already(run: Run, lenet5: Artifact, tmp_path: Path) -> None:
    commands = [
        ("convert", lenet5.path, "--fp16", "-o", tmp_path / "half"),
        ("build-trt", lenet5.path, "-o", tmp_path / "engine"),
    ]
    for command in commands:
        assert run(*command).status == 0
    lenet5.onnx_path.write_bytes(lenet5.onnx_path.read_bytes()[::-1])
    for command in commands:
        refused(run(*command), 1, "model.onnx is damaged")


def test_what_the_users_module_prints_stays_off_standard_output(run: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import torch\n"
        "class Loud(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('running')\n"
        "        return x.mean((2, 3)) @ torch.ones(1, 2)\n"
    )
    made = run(
        "export",
        "--model",
        f"{tmp_path / 'loud.py'}:Loud",
        "--input",
        "x=1x1x28x28",
        "--preprocess",
        "mnist",
        "-o",
        tmp_path / "loud",
    )
    assert made.status == 0, made.err
    assert "running" not in made.out
    evaluated = run("eval", tmp_path / "loud", images, "--backend", "eager", "--json")
    assert json.loads(evaluated.out)["images"] == 4
    assert "running" in evaluated.err


@pytest.mark.parametrize("command", [("inspect",), ("convert", "--fp16"), ("build-trt",), ("predict", "x.png")])
def test_a_manifest_edited_by_hand(run: Run, lenet5: Artifact, command: tuple[str, ...], tmp_path: Path) -> None:
    manifest = json.loads((lenet5.path / MANIFEST).read_text())
    manifest["source"]["random"] = False
    (lenet5.path / MANIFEST).write_text(json.dumps(manifest))
    refused(run(command[0], lenet5.path, *command[1:]), 1, "manifest.json was edited")


@pytest.mark.parametrize("command", [("inspect",), ("convert", "--fp16"), ("build-trt",), ("bench", "--seconds", "0.1")])
def test_a_payload_with_a_flipped_byte(run: Run, lenet5: Artifact, command: tuple[str, ...], tmp_path: Path) -> None:
    content = bytearray(lenet5.onnx_path.read_bytes())
    content[-100] ^= 1
    lenet5.onnx_path.write_bytes(bytes(content))
    out = () if command[0] in ("inspect", "bench") else ("-o", tmp_path / "out")
    refused(run(command[0], lenet5.path, *command[1:], *out), 1, "model.onnx is damaged")


FOLD = """
    <ir_version: 10, opset_import: ["" : 20]>
    folds (float[batch, 12, 16] x) => (float[batch, 3, 5, 5] y)
    <int64[2] image = {5, 5}, int64[2] block = {2, 2}> { [the_fold] y = Col2Im(x, image, block) }
"""


UNKNOWN = """
    <ir_version: 10, opset_import: ["" : 20, "their.domain" : 1]>
    unknown (float[batch, 4] x) => (float[batch, 4] y) { [odd] y = their.domain.Odd(x) }
"""


def test_a_bare_onnx_file_with_unsupported_operators(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "folds.onnx"
    onnx.save(onnx.parser.parse_model(FOLD), path)
    refused(run("build-trt", path, "-o", tmp_path / "out"), 1, "Col2Im 'the_fold'", "transposed convolution")
    refused(run("build-trt", path, "--preflight"), 1, "refuses 1 node of", "Col2Im 'the_fold'", "transposed convolution")
    onnx.save(onnx.parser.parse_model(UNKNOWN), tmp_path / "unknown.onnx")
    refused(run("build-trt", tmp_path / "unknown.onnx", "-o", tmp_path / "out"), 1, "Odd of domain their.domain", "unknown.onnx")
    finished = run("convert", tmp_path / "unknown.onnx", "--fp16", "-o", tmp_path / "out")
    refused(finished, 1, "unknown.onnx", "node 'odd'", "operator Odd of domain their.domain")
    assert not (tmp_path / "out").exists()
    with pytest.raises(deploy.DeployError, match="Odd"):
        deploy.load(tmp_path / "unknown.onnx")


def test_a_file_that_is_no_onnx(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00 not a graph")
    refused(run("export", "--onnx", tmp_path / "bad.onnx", "-o", tmp_path / "out"), 1, "not a valid ONNX file")
    refused(run("inspect", tmp_path / "missing.onnx"), 1, "missing.onnx")


def test_an_input_of_the_wrong_rank(run: Run, lenet5: Artifact, tmp_path: Path) -> None:
    with deploy.load(lenet5) as session, pytest.raises(InputError, match=r"3 dimensions 1x28x28; expected input: float32"):
        session(np.zeros((1, 28, 28), np.float32))
    refused(run("export", "--arch", "lenet5", "--input", "input=1x28x28", "-o", tmp_path / "out"), 1, "cannot run input")
    refused(run("build-trt", lenet5.path, "--shapes", "input=1x28x28", "-o", tmp_path / "out"), 2, "3 dimensions")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("export",), "--arch"),
        (("export", "--arch", "mlp", "--model", "x.py:Net"), "one of"),
        (("export", "--arch", "mlp", "--input", "x=1xq-1"), "cannot read the shape"),
        (("export", "--arch", "mlp", "--input", "1x100"), "cannot read the input"),
        (("export", "--arch", "mlp", "--output", "a", "--output", "b"), "1 outputs"),
        (("export", "--arch", "mlp", "--preprocess", "imagenet"), "one image input"),
        (("export", "--arch", "lenet5", "--preprocess", "imagnet"), "unknown preprocess"),
        (("export", "--arch", "mlp", "--opset", "7"), "18 to 25"),
        (("export", "--arch", "mlp", "--rtol", "-1"), "0 or more"),
        (("export", "--arch", "mlp", "--classes", "no.txt"), "no.txt"),
        (("export", "--arch", "mlp", "--surprise"), "--surprise"),
        (("export", "--arch", "lenet6"), "did you mean 'lenet5'"),
        (("export", "--arch", "torchvision:resnet19"), "did you mean 'resnet18'"),
        (("export", "--arch", "timm:resnet19"), "timm has no model 'resnet19'; did you mean"),
        (("export", "--arch", "keras:vgg"), "torchvision:NAME or timm:NAME"),
        (("export", "--arch", "lenet5", "--model-arg", "widht=2"), "no argument 'widht'"),
        (("export", "--arch", "torchvision:resnet18", "--model-arg", "widht=2"), "unexpected keyword argument 'widht'"),
        (("export", "--arch", "lenet5", "--model-arg", "width"), "NAME=VALUE"),
        (("export", "--arch", "lenet5", "--model-arg", "width=(2,"), "no Python literal"),
        (("export", "--model", "torch.nn:Linear", "--model-arg", "width=2"), "does not take these arguments"),
        (("export", "--model", "torch.nn:Linear", "--num-classes", "2"), "takes no num_classes"),
        (("export", "--arch", "mlp", "--name", "../x"), "plain name"),
        (("export", "--arch", "mlp", "--output", "input"), "'input' is given to two"),
        (("export", "--onnx", "x.onnx", "--match", "order"), "--match"),
        (("export", "--onnx", "x.onnx", "--arch", "mlp"), "--arch"),
        (("convert",), "--fp16"),
        (("convert", "--fp16", "--bf16"), "--fp16"),
        (("convert", "--fp16"), "no FP32 ONNX artifact under build"),
        (("build-trt", "--fp16", "--bf16"), "exclude"),
        (("eval",), "DIR|FILE.json"),
        (("predict",), "no image"),
        (("bench", "--batch", "1,x"), "--batch"),
        (("exprot",), "export"),
    ],
)
def test_wrong_usage_ends_with_status_2(
    run: Run, args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*args), 2, message)
    assert list(tmp_path.iterdir()) == []
