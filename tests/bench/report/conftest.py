from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.bench import bench
from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.options import BenchOptions
from tests.processors import processors


@pytest.fixture(scope="session")
def document(
    shared_lenet5: Artifact, half: Artifact, tmp_path_factory: pytest.TempPathFactory, once: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """A real document of `deploy bench --json`, with accuracies put in; tests must not change it."""
    return once("bench-document", lambda: _bench(shared_lenet5, half, tmp_path_factory.mktemp("loadgen")))


def _bench(lenet5: Artifact, half: Artifact, logs: Path) -> dict[str, Any]:
    options = BenchOptions(
        backends=("onnxruntime",), batches=(1, 4), seconds=0.2, layers=True, load_seconds=0.2, logs=logs,
        loads=(Load(concurrency=2),), scenarios=(Scenario(name="single-stream"), Scenario(name="server", target_qps=5000, target_ms=0.001)),
    )  # fmt: skip
    with processors():
        found: dict[str, Any] = bench([lenet5, half], options).to_json()
    for index, row in enumerate(found["results"]):
        row["top1"], row["top5"], row["accuracy_from"] = 98.0 + 0.1 * (index % 3), 100.0, "measured"
        row["score"] = {
            "metric": "top1", "value": row["top1"], "unit": "%", "lower": False, "low": row["top1"] - 1, "high": row["top1"] + 1,
            "parent": 98.0, "loss": 98.0 - row["top1"], "loss_low": 97.5 - row["top1"], "loss_high": 98.5 - row["top1"], "limit": None,
        }  # fmt: skip
    return found
