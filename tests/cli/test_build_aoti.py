"""`deploy build-aoti`, and what the other commands make of a package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact

Run = Callable[..., Any]


def test_the_newest_artifact_is_compiled_and_then_run_by_the_other_commands(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "mlp").status == 0
    done = run("build-aoti", "--device", "cpu", "--shapes", "input=1x100:2x100:4x100")
    assert done.status == 0, done.err
    assert "using build/mlp\n" in done.err
    assert done.out.startswith("build/mlp-aoti: AOTInductor package of torch 2.")
    assert "\n  shapes     input 1x100:2x100:4x100\n  built for  the CPU, x86_64 with the " in done.out
    assert "against eager on random batches 1, 2" in done.out
    assert json.loads(run("inspect", "build/mlp-aoti", "--json").out)["package"]["device"] == "cpu"
    document = folder / "bench.json"
    timed = run("bench", "--seconds", "0.2", "--batch", "1", "--json", document, "build/mlp", "build/mlp-aoti")
    assert timed.status == 0, timed.err
    rows = {(row["artifact"], row["backend"]) for row in json.loads(document.read_text())["results"]}
    assert ("build/mlp-aoti", "aoti") in rows
    refused = run("export-triton", "build/mlp-aoti", "-o", "repository")
    assert refused.status == 1
    assert "is an AOTInductor package, which this version cannot write for Triton" in refused.err
    assert not Path("repository").exists()


def test_flags_are_named_as_they_are_typed(run: Run, package: Artifact) -> None:
    refused = run("build-aoti", package.path)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    refused = run("build-aoti", package.root().path, "--fp16", "--bf16")
    assert (refused.status, "--fp16 and --bf16 exclude one another" in refused.err) == (2, True)
