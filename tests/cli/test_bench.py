"""`deploy bench`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from tests.cli.helpers import refused

Run = Callable[..., Any]

NO_TORCH = ("--baseline", "onnxruntime")
"""For what does not depend on the baseline: a process that loads torch takes seconds."""


def test_bench_writes_one_document_to_standard_output_when_json_has_no_file(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    for options in (["build/lenet5", "--json"], ["--json", "--batch", "1"], ["--json", "-"]):
        finished = run("bench", *options, "--seconds", "0.05", "--backend", "null", "--batch", "1", *NO_TORCH)
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
    options = ("--seconds", "0.05", "--batch", "1", "--backend", "null", *NO_TORCH, "--json")
    rows = json.loads(run("bench", "build/lenet5-fp16", *options).out)["results"]
    assert [(row["artifact"], row["backend"]) for row in rows] == [("build/lenet5", "onnxruntime"), ("build/lenet5-fp16", "null")]
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    rows = json.loads(run("bench", "../build/lenet5-fp16", "../build/lenet5", *options).out)["results"]
    assert {row["artifact"] for row in rows} == {"../build/lenet5", "../build/lenet5-fp16"}


def test_an_engine_that_was_named_and_cannot_run_is_an_error(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    assert run("build-trt").status == 0
    finished = run("bench", "build/lenet5", "build/lenet5-trt", "--seconds", "0.1")
    assert finished.status == 1
    assert "GPU" in finished.err


def test_a_batch_beyond_the_memory(run: Run, lenet5: Artifact) -> None:
    batch = 10**12  # beyond the address space, so that no machine tries
    finished = run("bench", lenet5.path, "--batch", batch, "--seconds", "0.1", *NO_TORCH)
    refused(finished, 1, f"error: no memory for an input with batch {batch}: Unable to allocate 2.79 PiB")
    assert len(finished.err.splitlines()) == 1
