"""A worker in this process does what one in a process of its own does."""

import os
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import ArtifactError, UsageError
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.here import WorkerHere

OPTIONS = SessionOptions(device="cpu", threads=1)


def test_it_is_prepared_timed_and_opened_anew(shared_lenet5: Artifact, lenet5: Artifact) -> None:
    with WorkerHere(shared_lenet5, "onnxruntime", OPTIONS) as worker:
        assert worker.pid == os.getpid()
        for artifact in (lenet5, shared_lenet5):
            assert worker.wait_open() > 0
            prepared = worker.prepare({"batch": 2})
            assert prepared.run_s > 0
            assert prepared.inputs > 1
            samples = worker.round(0.01, 20, warm_up=True)
            assert 1 <= len(samples) <= 20
            assert all(sample > 0 for sample in samples)
            worker.reopen(artifact)
        worker.wait_open()
        worker.ask_prepare({"batch": 1}, 0.0)
        assert worker.wait_prepared().first_s > 0


def test_errors_are_those_of_the_session(shared_lenet5: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'openvinno'"):
        WorkerHere(shared_lenet5, "openvinno", OPTIONS)
    with WorkerHere(shared_lenet5, "onnxruntime", OPTIONS) as worker, pytest.raises(ArtifactError, match="missing"):
        worker.reopen(Artifact(tmp_path / "missing", shared_lenet5.manifest))
