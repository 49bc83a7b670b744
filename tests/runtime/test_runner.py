import copy
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import ArtifactError, SessionClosedError
from deploy.runtime import lifetime

WAIT_S = 20
FEED = {"input": np.zeros((1, 1, 28, 28), np.float32)}


@pytest.fixture
def parts(shared_lenet5: Artifact) -> Iterator[dict[str, Any]]:
    with (
        deploy.load(shared_lenet5, "null") as session,
        deploy.Batcher(session) as batcher,
        deploy.Pipeline(batcher, dict, dict) as pipeline,
    ):
        yield {"session": session, "batcher": batcher, "pipeline": pipeline, "future": session.run_async(FEED)}


@pytest.mark.parametrize("part", ["session", "batcher", "pipeline", "future"])
@pytest.mark.parametrize(
    "send",
    [
        pytest.param(pickle.dumps, id="pickle"),
        pytest.param(lambda part: pickle.dumps([part], protocol=0), id="pickle of protocol 0"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(lambda part: copy.deepcopy({"model": part}), id="deepcopy"),
        pytest.param(lambda part: multiprocessing.reduction.ForkingPickler(io.BytesIO()).dump(part), id="multiprocessing"),
    ],
)
def test_what_cannot_leave_its_process_says_what_to_do(parts: dict[str, Any], part: str, send: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        send(parts[part])
    message = str(caught.value)
    assert message.startswith(f"a {part} cannot be pickled or copied: ")
    assert ("result()" if part == "future" else "load") in message
    assert "\n" not in message


def forked(work: Callable[[], object]) -> int:
    """The exit status of a child that does `work`; 0 where it returns, and SIGALRM's where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT_S)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_waits_for_the_runs_under_way_and_holds_back_new_ones(shared_lenet5: Artifact) -> None:
    gate, inside, order = threading.Event(), threading.Event(), []
    with deploy.load(shared_lenet5, "null") as session:
        compute = session._compute

        def slow(feed: Any) -> Any:
            order.append("run")
            inside.set()
            assert gate.wait(WAIT_S)
            order.append("ran")
            return compute(feed)

        session._compute = slow  # type: ignore[method-assign]
        first = threading.Thread(target=session.run, args=(FEED,))
        first.start()
        assert inside.wait(WAIT_S)

        def fork() -> None:
            assert forked(lambda: os._exit(0 if not lifetime.on_cpu and order == ["run", "ran"] else 3)) == 0
            order.append("forked")

        other = threading.Thread(target=fork)
        other.start()
        while not lifetime.forking():
            time.sleep(0.001)
        second = threading.Thread(target=session.run, args=(FEED,))
        second.start()
        time.sleep(0.05)
        assert order == ["run"]
        gate.set()
        for thread in (first, other, second):
            thread.join(WAIT_S)
        assert sorted(order) == ["forked", "ran", "ran", "run", "run"]
        assert session.run(FEED)["logits"].shape == (1, 10)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_run_that_forks_does_not_wait_for_itself(shared_lenet5: Artifact) -> None:
    with deploy.load(shared_lenet5, "null") as session:
        compute, statuses = session._compute, []

        def forking(feed: Any) -> Any:
            session._compute = compute  # type: ignore[method-assign]
            statuses.append(forked(lambda: session.run(FEED)))
            return compute(feed)

        session._compute = forking  # type: ignore[method-assign]
        start = time.monotonic()
        session.run(FEED)
        assert statuses == [0]
        assert time.monotonic() - start < lifetime.LIMIT_S / 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_opens_the_file_that_was_loaded_and_no_other(
    lenet5: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(lenet5.path.parent)
    session = deploy.load("lenet5", "onnxruntime")
    expected = session.run(FEED)["logits"]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # as a daemon does

    def right() -> None:
        np.testing.assert_array_equal(session.run(FEED)["logits"], expected)

    assert forked(right) == 0
    lenet5.onnx_path.write_bytes(lenet5.onnx_path.read_bytes()[:-1] + b"?")

    def refused() -> None:
        for _ in range(2):
            with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
                session.run(FEED)
        session.close()
        with pytest.raises(SessionClosedError):
            session.run(FEED)

    assert forked(refused) == 0
    right()
    session.close()


def test_a_process_pool_says_what_to_do(shared_lenet5: Artifact) -> None:
    code = f"""
import multiprocessing, deploy
if __name__ == "__main__":
    session = deploy.load({str(shared_lenet5.path)!r}, "null")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(repr, (session,))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("TypeError: a session cannot be pickled or copied: ")
