"""`benchmarks/gpu_report.py` without a GPU: that it runs, and that it says what it is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
ONE = {"value": 2.5, "low": 2.0, "high": 3.0}


@pytest.fixture
def report(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("gpu_report")


def part(name: str, **found: Any) -> dict[str, Any]:
    where = {
        "gpu": "NVIDIA Fake",
        "driver": "580",
        "cuda": "13.0",
        "cpu": "AMD",
        "cores": 2,
        "versions": {"torch": "2.14"},
        "time": "now",
    }
    return {"part": name, "seconds": 1.0, "conditions": where, **found}


def overhead(bare: float, more_us: float, copied: float) -> dict[str, Any]:
    figures = {
        "session_over_bare": {"value": bare, "low": 0.9, "high": 1.1},
        "session_more_us": more_us,
        "graph_more_us": more_us,
        "numpy_over_copy_and_compute": copied,
    }
    return part("overhead", overhead={"resnet50, batch 8": figures, "lenet5, batch 1": figures})


def test_goals_are_met_or_not_and_what_is_missing_is_said(report: ModuleType) -> None:
    met = report.goals([overhead(1.02, 12.0, 1.05)])
    assert [line.endswith(": met") for line in met[:4]] == [True] * 4
    assert met[4:] == ["resnet50 in FP16 against PyTorch: not measured"]
    missed = report.goals([overhead(1.2, 30.0, 1.3)])
    assert [line.endswith(": NOT met") for line in missed[:4]] == [True] * 4
    slow = {"batch": 1, "speedup": {"engine, CUDA graph": {"eager fp16 channels_last": {**ONE, "value": 1.9}, "compile": ONE}}}
    lines = report.goals([part("resnet50-fp16", rows=[slow])])
    assert lines[0] == "what the session adds to the engine: not measured"
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["NOT met", "met"]


def test_parts_of_two_gpus_are_not_mixed(report: ModuleType, tmp_path: Path) -> None:
    other = part("lenet5-fp32")
    other["conditions"]["gpu"] = "NVIDIA Other"
    for document in (overhead(1, 1, 1), other):
        (tmp_path / f"{document['part']}.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="parts of several GPUs: NVIDIA Fake, NVIDIA Other"):
        report.read(tmp_path)
    with pytest.raises(SystemExit, match="no part in"):
        report.read(tmp_path / "empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no NVIDIA GPU that CUDA can use: nothing was measured" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_goes_all_the_way_and_says_that_it_is_dry(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--dry-run", "--part", "lenet5-fp16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "None of these figures is of a GPU" in done.stdout
    assert "# Engines on no GPU (dry run)" in done.stdout
    assert "100% fp16 (network)" in done.stdout
    assert "not measured: overhead, lenet5-fp32" in done.stdout
    assert list(tmp_path.iterdir()) == []
