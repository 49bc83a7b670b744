"""The commands do what they say, with their defaults, in the order in which a user types them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.models.registry import ARCHITECTURES

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a checkpoint, class names and an ImageFolder of digits."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(ARCHITECTURES["lenet5"].create().state_dict(), "w.pth")
    Path("classes.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    for number in (3, 7):
        (tmp_path / "images" / f"digit {number}").mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"digit {number}" / f"{index}.png")
    return tmp_path


def test_the_session_of_the_help_text_works_as_it_stands(run: Run, folder: Path) -> None:
    exported = run("export", "--arch", "lenet5", "--weights", "w.pth", "--classes", "classes.txt")
    assert exported.status == 0, exported.err
    assert exported.out.startswith("build/lenet5: ONNX, fp32, 249 kB\n")
    assert "warning" not in exported.err

    built = run("build-trt", "--fp16")
    assert built.status == 0, built.err
    assert "using build/lenet5" in built.err
    assert built.out.startswith("build/lenet5-fp16-trt: tensorrt-rtx")
    assert "100.0% fp16 of the multiply-accumulates (read from the network)" in built.out

    converted = run("convert", "--fp16")
    assert converted.status == 0, converted.err
    assert "using build/lenet5\n" in converted.err
    assert converted.out.startswith("build/lenet5-fp16: ONNX, fp16")

    benched = run("bench", "--batch", "1,2", "--seconds", "0.3", "--json", "bench.json")
    assert benched.status == 0, benched.err
    assert max(len(line) for line in benched.out.splitlines()) <= 100
    document = json.loads(Path("bench.json").read_text())
    assert set(document) == {
        "schema",
        "baseline",
        "interrupted",
        "conditions",
        "results",
        "loads",
        "scenarios",
        "layers",
        "artifacts",
        "skipped",
    }
    rows = {(row["artifact"], row["backend"], row["batch"]) for row in document["results"]}
    for name in ("build/lenet5", "build/lenet5-fp16"):
        assert {(name, backend, batch) for backend in ("onnxruntime", "openvino") for batch in (1, 2)} <= rows
    assert {("build/lenet5", "eager", 1), ("build/lenet5", "eager", 2)} <= rows
    for row in document["results"]:
        assert {"p50_ms", "p90_ms", "p99_ms", "images_per_s", "speedup", "speedup_low", "speedup_high", "samples_ms"} <= set(row)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["samples_ms"]
    assert [(entry["artifact"], "GPU" in entry["reason"]) for entry in document["skipped"]] == [("build/lenet5-fp16-trt", True)]


def test_bench_writes_one_document_to_standard_output_when_json_has_no_file(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    for options in (["build/lenet5", "--json"], ["--json", "--batch", "1"], ["--json", "-"]):
        finished = run("bench", *options, "--seconds", "0.05", "--backend", "null")
        assert finished.status == 0, finished.err
        assert {row["artifact"] for row in json.loads(finished.out)["results"]} == {"build/lenet5"}
    # The name is taken for that of the FILE: said, and nothing is written.
    Path("nets").mkdir()
    Path("notes.txt").write_text("mine")
    Path("odd.json").mkdir()
    for name in ("build/lenet5", "nets", "notes.txt", "new.txt", "odd.json"):
        refused = run("bench", "--json", name)
        assert refused.status == 2
        assert f"--json takes a FILE ending in .json, not {name}; put artifacts before it" in refused.err
    assert Path("notes.txt").read_text() == "mine"
    assert not Path("new.txt").exists()


def test_bench_takes_variants(run: Run, folder: Path) -> None:
    run("export", "--arch", "lenet5")
    options = ("--batch", "1", "--seconds", "0.05")
    finished = run("bench", *options, "--backend", "eager:fp16,channels_last,null", "--json", "bench.json")
    assert finished.status == 0, finished.err
    rows = json.loads(Path("bench.json").read_text())["results"]
    assert [(row["backend"], row["precision"]) for row in rows] == [
        ("eager", "fp32"),
        ("null", "fp32"),
        ("eager:fp16,channels_last", "fp16"),
    ]
    assert rows[2]["max_abs_error"] > 0
    assert "eager:fp16" in finished.out
    assert max(len(line) for line in finished.out.splitlines()) <= 100
    unknown = run("bench", *options, "--backend", "null", "--backend", "eager:fp8")
    assert unknown.status == 2
    assert "eager has no variant 'fp8'; expected one of fp16" in unknown.err


def test_bench_names_the_export_as_the_user_does_though_only_its_descendant_was_named(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    assert run("convert", "--fp16").status == 0
    options = ("--seconds", "0.05", "--batch", "1", "--backend", "null", "--json")
    rows = json.loads(run("bench", "build/lenet5-fp16", *options).out)["results"]
    assert [(row["artifact"], row["backend"]) for row in rows] == [("build/lenet5", "eager"), ("build/lenet5-fp16", "null")]
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    rows = json.loads(run("bench", "../build/lenet5-fp16", "../build/lenet5", *options).out)["results"]
    assert {row["artifact"] for row in rows} == {"../build/lenet5", "../build/lenet5-fp16"}


def test_null_says_that_its_classes_mean_nothing(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5", "--classes", "classes.txt").status == 0
    for command in ("eval", "predict"):
        finished = run(command, "images", "--backend", "null")
        assert finished.status == 0, finished.err
        assert "warning: null computes nothing: all logits are 0" in finished.err


def test_an_engine_that_was_named_and_cannot_run_is_an_error(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    assert run("build-trt").status == 0
    finished = run("bench", "build/lenet5", "build/lenet5-trt", "--seconds", "0.1")
    assert finished.status == 1
    assert "GPU" in finished.err


def test_eval_and_predict_pair_folders_with_class_names(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5", "--weights", "w.pth", "--classes", "classes.txt").status == 0
    evaluated = run("eval", "images", "--json", "--batch-size", "3")
    assert evaluated.status == 0, evaluated.err
    result = json.loads(evaluated.out)
    assert {"top1", "top5", "images", "images_per_s", "backend"} <= set(result)
    assert result["images"] == 4
    assert result["backend"] == "onnxruntime"
    assert "4 images" in run("eval", "build/lenet5", "images", "--backend", "openvino").out

    predicted = run("predict", "build/lenet5", "images/digit 3/0.png", "--top", "2", "--json")
    assert predicted.status == 0, predicted.err
    document = json.loads(predicted.out)
    assert (result["schema"], document["schema"]) == (1, 1)
    (answer,) = document["predictions"]
    assert answer["path"] == "images/digit 3/0.png"
    assert len(answer["classes"]) == 2
    assert answer["classes"][0]["class"].startswith("digit ")
    everything = run("predict", "images", "--top", "1")
    assert len(everything.out.splitlines()) == 4

    # Top-1 is what predict says.
    best = [line.rpartition(": ")[2].rpartition(" ")[0] for line in everything.out.splitlines()]
    right = sum(name in line.partition(": ")[0] for name, line in zip(best, everything.out.splitlines(), strict=True))
    assert result["top1"] == pytest.approx(25 * right)


def test_inspect_prints_the_manifest_as_json_and_the_lineage_as_text(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "mlp", "-o", "nets/net").status == 0
    assert run("convert", "nets/net", "--bf16", "-o", "nets/half").status == 0
    shown = run("inspect", "nets/half", "--json")
    assert json.loads(shown.out)["digest"] == Artifact.open("nets/half").manifest.digest
    assert shown.err == ""
    text = run("inspect", "nets/half").out
    assert "from       nets/net (fp32" in text
    assert "random: never trained" in text
    assert "SHA-256 verified" in text


def test_the_newest_artifact_is_taken_and_named(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    assert run("export", "--arch", "mlp", "-o", "build/nets/mlp").status == 0
    assert "using build/nets/mlp" in run("inspect").err
    assert "using build/lenet5" in run("predict", "images").err  # the newest that classifies images
    Path("build/broken").mkdir()
    Path("build/broken/manifest.json").write_text("{")
    shown = run("inspect")
    assert "warning: left out: build/broken/manifest.json cannot be read" in shown.err
    assert "using build/nets/mlp" in shown.err


def test_doctor_names_every_backend_and_what_is_missing(run: Run) -> None:
    report = json.loads(run("doctor", "--json").out)
    backends = {entry["name"]: entry for entry in report["backends"]}
    variants = {"onnxruntime:cuda", "onnxruntime:tensorrt"}
    assert set(backends) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "eager", "compile", "null"} | variants
    assert backends["openvino"]["available"]
    for name in ("tensorrt", "tensorrt-rtx", *variants):
        if not backends[name]["available"]:
            assert "deploy[gpu]" in backends[name]["reason"] or "NVIDIA GPU" in backends[name]["reason"]
    flavours = {entry["name"]: entry for entry in report["flavours"]}
    assert flavours["tensorrt-rtx"]["available"]
    if not flavours["tensorrt"]["available"]:
        assert "deploy[gpu]" in flavours["tensorrt"]["reason"] or "GPU" in flavours["tensorrt"]["reason"]
    text = run("doctor").out
    assert "openvino" in text
    assert "tensorrt-rtx" in text


@pytest.mark.parametrize("command", ["doctor", "export", "convert", "build-trt", "inspect", "eval", "predict", "bench"])
def test_every_command_has_help_that_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['deploy', {command!r}, '--help']\n"
        "from deploy.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: deploy {command}")
    assert "--debug" in done.stdout
    assert done.stderr.strip() == ""


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    assert "Traceback" not in run("inspect", tmp_path / "no").err
    assert "Traceback" in run("inspect", tmp_path / "no", "--debug").err


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "deploy", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("deploy, version ")


def test_preflight_reads_the_model_and_builds_nothing(run: Run, folder: Path) -> None:
    run("export", "--arch", "lenet5")
    before = sorted(Path("build").iterdir())
    for options, share in (((), "100.0% fp32"), (("--fp16",), "100.0% fp16")):
        checked = run("build-trt", "--preflight", *options)
        assert checked.status == 0, checked.err
        assert re.fullmatch(
            rf"build/lenet5: tensorrt-rtx \S+ takes all \d+ nodes; {share} of the multiply-accumulates \(read from the network\)\n",
            checked.out,
        )
    assert sorted(Path("build").iterdir()) == before


def test_profiles_and_targets_of_the_command_line_are_shown(run: Run, folder: Path) -> None:
    run("export", "--arch", "lenet5")
    shapes = ("1x1x28x28:1x1x28x28:4x1x28x28", "8x1x28x28:16x1x28x28:64x1x28x28")
    options = [word for each in shapes for word in ("--shapes", f"input={each}")]
    built = run("build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64")
    assert built.status == 0, built.err
    for each in shapes:
        assert f"shapes     input {each}\n" in built.out
    assert "built for  compute capability 8.6, 8.9\n" in built.out
    again = run("build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64", "-o", "again", "--debug")
    assert "the same engine was built before: copied from" in again.err
    anew = run(
        "build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64", "-o", "anew", "--no-cache", "--debug"
    )
    assert anew.status == 0, anew.err
    assert "copied from" not in anew.err
