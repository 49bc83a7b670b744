"""What a benchmark asks of a candidate's process, and what comes back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.candidate.traffic import Load
from deploy.errors import BackendError
from deploy.runtime.session import SessionOptions

CPU = SessionOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def process(shared_lenet5: Artifact) -> Iterator[CandidateProcess]:
    with CandidateProcess(shared_lenet5, "onnxruntime", CPU) as opened:
        opened.wait_open()
        opened.prepare({"batch": 1})
        yield opened


def test_answers_under_load_come_back_with_their_times(process: CandidateProcess) -> None:
    done = process.load(Load(concurrency=2), 0.2)
    assert len(done.latencies_s) > 10
    assert done.elapsed_s >= 0.2
    assert done.unanswered == 0
    assert 0 < min(done.latencies_s) <= max(done.latencies_s) <= done.elapsed_s


def test_the_verdict_of_loadgen_comes_back_and_its_logs_stay(process: CandidateProcess, tmp_path: Path) -> None:
    judged = process.judge(Scenario(name="single-stream"), 1, 1e-4, 0.2, tmp_path / "logs")
    assert (judged.valid, judged.reasons, judged.unit) == (True, (), "ms")
    assert (tmp_path / "logs" / "mlperf_log_summary.txt").is_file()


def test_layers_come_back_with_nodes_and_modules(process: CandidateProcess) -> None:
    layers = process.layers()
    assert all(layer.ms >= 0 for layer in layers)
    assert ("conv1",) in {layer.modules[:1] for layer in layers}
    assert all(isinstance(layer.nodes, tuple) for layer in layers)


def test_on_the_cpu_there_are_no_times_of_a_gpu(process: CandidateProcess) -> None:
    assert process.device_times() is None


def test_a_question_that_cannot_be_answered_is_an_error_and_the_process_goes_on(shared_lenet5: Artifact) -> None:
    with CandidateProcess(shared_lenet5, "null", CPU) as process:
        process.wait_open()
        process.prepare({"batch": 2})
        with pytest.raises(BackendError, match="null does not report the time of its layers"):
            process.layers()
        assert len(process.round(1.0, 5)) == 5
