"""Statuses and texts of errors, and how models are described."""

import asyncio

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import (
    ArtifactError,
    BackendError,
    DataError,
    DeadlineError,
    InputError,
    ModelNotFoundError,
    QueueFullError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from deploy.serving.answers import config, metadata, statistics, status_of, text_of
from deploy.serving.metrics import Meter
from deploy.serving.models import ModelOptions, open_served
from deploy.serving.source import ModelSource


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RefusedError(418, "x"), 418), (ModelNotFoundError("x"), 404), (InputError("x"), 400), (UsageError("x"), 400),
        (DataError("x"), 400), (QueueFullError("x"), 503), (UnavailableError("x"), 503), (DeadlineError("x"), 503),
        (BackendError("x"), 500), (ArtifactError("x"), 500), (ZeroDivisionError("x"), 500),
    ],
)  # fmt: skip
def test_an_error_has_a_status(error: Exception, status: int) -> None:
    assert status_of(error) == status


def test_a_bug_shows_nothing_of_the_inside_of_the_server() -> None:
    assert text_of(BackendError("the device is lost")) == "the device is lost"
    assert text_of(KeyError("/etc/secret")) == "an error in the server; its log says more"


def test_a_model_of_a_fixed_batch_is_described_with_it(fixed: Artifact) -> None:
    served = open_served(ModelSource(name="net", path=fixed.path, version="3"), ModelOptions(), Meter("net", "3"))
    try:
        assert metadata(served, ["1", "3"]) == {
            "name": "net", "versions": ["1", "3"], "platform": "deploy_onnxruntime",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1, 28, 28]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 10]}],
        }  # fmt: skip
        document = config(served)
        assert (document["max_batch_size"], document["input"][0]["dims"]) == (0, [1, 1, 28, 28])
        assert "dynamic_batching" not in document
        asyncio.run(served.batcher.run_async({"input": np.zeros((1, 1, 28, 28), np.float32)}))
        served.batcher.close()  # the answer comes before the batch is counted
        counted = statistics(served)
        assert (counted["name"], counted["version"], counted["inference_stats"]["success"]["count"]) == ("net", "3", 1)
    finally:
        served.batcher.close()
        served.session.close()
