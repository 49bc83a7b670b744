"""What the README shows, works."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ deploy "), comments=True) for line in lines if line.startswith("$ deploy ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_python_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith(" 1.0")
    assert shown[1] == "input: float32 batchx1x28x28 (4, 10)"


def test_the_eight_lines_and_those_on_int8_and_engines_run_as_they_stand(folder: Path, run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    torch.save(ARCHITECTURES["resnet34"].create(num_classes=2).state_dict(), "resnet34.pth")
    Path("classes.txt").write_text("cat\ndog\n")
    for index, label in enumerate(("cat", "dog")):
        for part in ("train", "val"):
            (folder / "photographs" / part / label).mkdir(parents=True)
            pixels = np.full((60, 80, 3), 200 * index, np.uint8)
            Image.fromarray(pixels).save(folder / "photographs" / part / label / "1.png")
    Image.new("RGB", (50, 40)).save("cat.jpg")
    lines = commands(blocks("console")[0])
    assert len(lines) == 8
    extra = {"export": ["--input", "input=1x3x32x32", "--classes", "classes.txt"], "bench": ["--seconds", "0.2", "--batch", "1"]}
    for line in [*lines, *commands(blocks("console")[1]), *commands(blocks("console")[2])]:
        line = [word.replace("3x224x224", "3x32x32") for word in line]
        finished = run(*line, *extra.get(line[0], []))
        assert finished.status == 0, (line, finished.err)
        assert finished.out


def test_the_commands_on_benchmarks_run(folder: Path, run: Callable[..., Any]) -> None:
    for index in range(10):
        (folder / "photographs" / "val" / str(index)).mkdir(parents=True)
        Image.fromarray(np.full((28, 28), 25 * index, np.uint8)).save(folder / "photographs" / "val" / str(index) / "1.png")
    assert run("export", "--arch", "lenet5").status == 0
    measure, compare = commands(blocks("console")[3])
    for name in ("old.json", "new.json"):
        line = [name if word == "new.json" else word for word in measure]
        finished = run(*line, "--seconds", "0.3", "--batch", "1")
        assert finished.status == 0, finished.err
    assert "<!doctype html>" in Path("bench.html").read_text()
    compared = run(*compare)
    assert compared.status in (0, 1), compared.err
    assert "times as fast" in compared.out


def test_the_keys_of_the_json_are_documented() -> None:
    from dataclasses import fields

    from deploy.bench.rows import SCHEMA, BenchResult, BenchRow, LayersRow, LoadRow, ScenarioRow
    from deploy.runtime.profiling import LayerTime

    text = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    assert f"(schema {SCHEMA})" in text
    rows = (BenchRow, LayersRow, LoadRow, ScenarioRow, LayerTime)
    names = {field.name for kind in rows for field in fields(kind)} | BenchResult(
        conditions={}, results=(), skipped=()
    ).to_json().keys()
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_the_command_for_ones_own_model_runs(folder: Path, run: Callable[..., Any]) -> None:
    Path("my_models").mkdir()
    Path("my_models/net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self, width, num_classes=2):\n"
        "        super().__init__(torch.nn.Conv2d(3, width, 3, 32), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),\n"
        "                         torch.nn.Flatten(), torch.nn.Linear(width, num_classes))\n"
    )
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 64, 3, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    torch.save(net.state_dict(), "best.pth")
    Path("classes.txt").write_text("a\nb\nc\n")
    (line,) = commands(blocks("console")[4])
    finished = run(*line)
    assert finished.status == 0, finished.err
    assert finished.out.startswith("build/net: ONNX, fp32")
    assert "scores: float32 batchx3" in finished.out


def test_the_commands_on_serving_run(folder: Path, run: Callable[..., Any]) -> None:
    import deploy

    serve, export = commands(blocks("console")[5])
    for name in ("build/resnet34-int8", "build/resnet34-fp16"):  # a small net in their stead
        deploy.export(name, arch="lenet5", name=Path(name).name)
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", *serve, "--http-port", "0", "--grpc-port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        lines = [json.loads(next(process.stderr)) for _ in range(3)]
        assert [line["message"] for line in lines] == ["loaded", "serving", "serving"]
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0
    finished = run(*export)
    assert finished.status == 0, finished.err
    assert finished.out.splitlines() == ["triton/resnet34-fp16/1", "triton/inferenceservice.yaml"]


def test_the_code_on_the_batcher_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import deploy

    deploy.export("build/digits", arch="lenet5")
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    exec(compile(code, "serving.md", "exec"), {})
    assert capsys.readouterr().out == "(2, 10) (1, 10)\n"


def test_every_option_and_call_of_the_server_is_documented() -> None:
    from deploy.cli.serve import command

    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    usual = {"--backend", "--device", "--threads", "--debug", "--host", "--http-port", "--grpc-port", "--no-http", "--no-grpc"}
    assert [name for name in options if name not in usual and f"`{name}`" not in text] == []


def test_every_file_and_picture_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(r"`(examples/\S+?)`", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_option_of_the_commands_in_the_readme_is_known(run: Callable[..., Any]) -> None:
    for line in (line for block in blocks("console") for line in commands(block)):
        text = run(line[0], "--help").out
        for word in line:
            if word.startswith("--"):
                assert word in text
