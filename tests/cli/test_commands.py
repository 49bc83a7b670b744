"""The commands do what they say, with their defaults, in the order in which a user types them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_the_session_of_the_help_text_works_as_it_stands(run: Run, folder: Path) -> None:
    exported = run("export", "--arch", "lenet5", "--weights", "w.pth", "--classes", "classes.txt")
    assert exported.status == 0, exported.err
    assert exported.out.startswith("build/lenet5: ONNX, fp32, 250 kB\n")
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


def test_null_says_that_its_classes_mean_nothing(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5", "--classes", "classes.txt").status == 0
    for command in ("eval", "predict"):
        finished = run(command, "images", "--backend", "null")
        assert finished.status == 0, finished.err
        assert "warning: null computes nothing: all logits are 0" in finished.err


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
