import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.tensors import random_feed
from deploy.errors import ArtifactError, BackendError, WorkerDiedError
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import WorkerProcess

OPTIONS = SessionOptions(device="cpu", threads=2)


NOISY = """
import os
import sys
import threading
import time

import torch
from torch import nn


def spin():
    start = time.perf_counter()
    while time.perf_counter() - start < 1.5:
        pass


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        print("built")
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        if not torch.compiler.is_exporting() and os.environ.get("NOISY") == "die":
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        if not torch.compiler.is_exporting() and os.environ.get("NOISY") == "fork":
            if child := os.fork():
                print(f"left {child}", file=sys.stderr, flush=True)
                os._exit(8)
            time.sleep(60)
        if not torch.compiler.is_exporting() and os.environ.get("NOISY") == "spin":
            os.environ["NOISY"] = "spun"
            threading.Thread(target=spin).start()
        return self.linear(x)
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A module that prints to standard output. $NOISY `die` ends its process, `fork` does so and leaves a copy that sleeps,
    `spin` leaves a busy thread for a while."""
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "noisy_net.py").write_text(NOISY, encoding="utf-8")
    return deploy.export(folder / "noisy", model=f"{folder / 'noisy_net.py'}:Noisy", inputs=["x=1x4"])


@pytest.fixture(scope="module")
def worker(shared_lenet5: Artifact) -> Iterator[WorkerProcess]:
    with WorkerProcess(shared_lenet5, "onnxruntime", OPTIONS) as process:
        process.wait_open()
        yield process


def test_rounds_give_samples_within_the_time_and_the_most(worker: WorkerProcess) -> None:
    assert 0 < worker.prepare({"batch": 4}).run_s < 1
    start = time.perf_counter()
    samples = worker.round(0.1, 1_000_000)
    assert 0.05 < sum(samples) < 0.2
    assert time.perf_counter() - start < 2
    assert len(worker.round(10.0, 20)) == 20


def assert_runs(process: WorkerProcess, artifact: Artifact, outputs: Path, rows: int = 3) -> None:
    """The worker's outputs on its first feed are those of a session here."""
    process.prepare({"batch": rows}, outputs)
    with np.load(outputs) as file:
        (logits,) = file.values()
    with open_session(artifact, "onnxruntime") as session:
        expected = session.run(random_feed(session.inputs, {"batch": rows}))["logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


def test_every_worker_makes_the_same_feed_and_saves_what_comes_of_it(
    worker: WorkerProcess, shared_lenet5: Artifact, tmp_path: Path
) -> None:
    assert_runs(worker, shared_lenet5, tmp_path / "outputs.npz")


def test_a_process_opens_one_artifact_after_another(
    shared_lenet5: Artifact, reference: Callable[[str], Artifact], tmp_path: Path
) -> None:
    other = reference("mlp")
    with WorkerProcess(shared_lenet5, "onnxruntime", OPTIONS) as process:
        first = process.pid
        process.wait_open()
        process.prepare({"batch": 1})
        for artifact in (other, shared_lenet5):
            process.reopen(artifact)
            assert process.wait_open() > 0
            assert_runs(process, artifact, tmp_path / "outputs.npz")
            assert len(process.round(0.1, 5)) == 5
        assert process.pid == first


def test_what_is_opened_next_gets_the_same_feeds_only_where_it_takes_the_same_inputs(
    shared_lenet5: Artifact, tmp_path: Path
) -> None:
    with WorkerProcess(shared_lenet5, "onnxruntime", OPTIONS) as process:
        process.wait_open()
        for index, rows in enumerate((3, 3, 1, 3)):
            if index:
                process.reopen(shared_lenet5)
                process.wait_open()
            process.ask_prepare({"batch": rows}, 0.0)
            prepared = process.wait_prepared()
            assert prepared.run_s > 0
            assert (
                prepared.input_bytes // prepared.inputs
                == random_feed(shared_lenet5.manifest.inputs, {"batch": rows})["input"].nbytes
            )
            assert_runs(process, shared_lenet5, tmp_path / "outputs.npz", rows)


def test_an_artifact_that_does_not_open_is_an_error_after_which_another_opens(shared_lenet5: Artifact, lenet5: Artifact) -> None:
    (lenet5.path / ONNX).write_bytes(b"rubbish")
    with WorkerProcess(shared_lenet5, "onnxruntime", OPTIONS) as process:
        process.wait_open()
        process.reopen(lenet5)
        with pytest.raises(ArtifactError, match=r"model\.onnx has 7 bytes"):
            process.wait_open()
        process.reopen(shared_lenet5)
        assert process.wait_open() > 0
        assert process.prepare({"batch": 1}).run_s > 0


def used(process: WorkerProcess) -> float:
    """Seconds of processor time that the worker has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_an_idle_worker_uses_no_processor_time(shared_lenet5: Artifact, backend: str) -> None:
    with WorkerProcess(shared_lenet5, backend, OPTIONS) as process:
        process.wait_open()
        process.prepare({"batch": 32})
        process.round(0.1, 500)
        before = used(process)
        time.sleep(0.3)
        assert used(process) - before <= 0.02


def test_a_worker_replies_when_threads_that_spin_have_stopped(noisy: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY", "spin")
    with WorkerProcess(noisy, "eager", OPTIONS) as process:
        process.wait_open()
        start = time.perf_counter()
        process.prepare({"batch": 1})
        assert time.perf_counter() - start >= 1.5
        before = used(process)
        time.sleep(0.2)
        assert used(process) - before <= 0.02


def test_what_libraries_and_models_print_does_not_disturb(noisy: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerProcess(noisy, "eager", OPTIONS) as process:
        process.wait_open()
        assert process.prepare({"batch": 2}).run_s > 0
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_session_is_raised_as_the_same_error(lenet5: Artifact) -> None:
    with WorkerProcess(lenet5, "onnxruntime", SessionOptions(device="cuda")) as process:
        with pytest.raises(BackendError, match=r"onnxruntime runs on cpu in this version, not on cuda") as caught:
            process.wait_open()
        assert not isinstance(caught.value, WorkerDiedError)
    (lenet5.path / ONNX).write_bytes(b"damaged")
    with WorkerProcess(lenet5, "onnxruntime", OPTIONS) as process, pytest.raises(ArtifactError, match=r"model\.onnx has 7 bytes"):
        process.wait_open()


def test_a_worker_that_ends_is_reported_with_its_last_lines(noisy: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY", "die")
    with WorkerProcess(noisy, "eager", OPTIONS) as process:
        process.wait_open()
        with pytest.raises(WorkerDiedError, match=r"noisy on eager died \(exit status 7\); its last lines: .*last words"):
            process.prepare({"batch": 1})
        with pytest.raises(WorkerDiedError):  # and again at every later request
            process.round(0.1, 5)


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds (a zombie has ended)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_worker_that_ends_is_reported_though_a_copy_of_it_holds_the_pipe(
    noisy: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOISY", "fork")
    with WorkerProcess(noisy, "eager", OPTIONS) as process:
        process.wait_open()
        start = time.perf_counter()
        with pytest.raises(WorkerDiedError, match=r"died \(exit status 8\); its last lines: .*left \d+") as caught:
            process.prepare({"batch": 1})
        assert time.perf_counter() - start < 20
        copy = int(str(caught.value).rpartition(" ")[2])
        os.kill(copy, 0)
    assert gone(copy)


PARENT = """
import os, signal, sys
from deploy.artifact.artifact import Artifact
from deploy.runtime.worker.process import WorkerProcess
from deploy.runtime.session import SessionOptions
process = WorkerProcess(Artifact.open(sys.argv[1]), "null", SessionOptions())
process.wait_open()
# The pipe that the worker waits on stays open, so that only the death of this process can end it.
if os.fork():
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.close(1)
sys.stdin.read()
"""


def test_a_worker_dies_with_a_parent_that_is_killed(shared_lenet5: Artifact) -> None:
    command = [sys.executable, "-c", PARENT, str(shared_lenet5.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.wait(60) == -signal.SIGKILL
        assert gone(pid)


def test_a_worker_that_is_killed_is_reported_with_the_signal(shared_lenet5: Artifact) -> None:
    with WorkerProcess(shared_lenet5, "null", OPTIONS) as process:
        process.wait_open()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match=r"killed by signal 9 \(out of memory\?\)"):
            process.prepare({"batch": 1})


def test_leaving_the_block_ends_the_process(shared_lenet5: Artifact) -> None:
    with WorkerProcess(shared_lenet5, "null", OPTIONS) as process:
        pid = process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_folder_named_as_ours_where_the_user_stands_is_not_imported(
    shared_lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__init__.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with WorkerProcess(shared_lenet5, "null", OPTIONS) as process:
        process.wait_open()
