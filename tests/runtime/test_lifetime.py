"""Forks and ends of real programs: each backend, in processes of its own."""

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.runtime import lifetime


@pytest.fixture
def artifact_for(request: pytest.FixtureRequest) -> Callable[[str], Artifact]:
    """An artifact that a backend runs. The package takes long to compile."""
    return lambda backend: request.getfixturevalue("package" if backend == "aoti" else "shared_lenet5")


FORKS = """
import json, os, signal, sys, threading

import numpy as np

import deploy

FEED = {"input": np.random.default_rng(0).standard_normal((32, 1, 28, 28), dtype=np.float32)}
seen = {}

def fork(session, uses, expected):
    # What a child gets from each use of what was made before the fork, and how it ends.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        found = {}
        for name, use in uses.items():
            try:
                found[name] = bool(np.allclose(use(), expected, atol=1e-5))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        session.close()
        os.write(writer, json.dumps(found).encode())
        sys.exit(7)  # which in another thread than the main one ends that alone
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as file:
        text = file.read()
    return {"status": status, **(json.loads(text) if text else {})}

for backend, path in zip(sys.argv[1::2], sys.argv[2::2]):
    session = deploy.load(path, backend=backend, threads=2, contexts=2)
    batcher = deploy.Batcher(session)
    pipeline = deploy.Pipeline(batcher, dict, lambda outputs: outputs)
    late = deploy.Batcher(session, deploy.BatcherOptions(delay_ms=900_000)).submit(  # never answered
        {"input": FEED["input"][:1]}
    )
    uses = {
        "run": lambda: session.run(FEED)["logits"],
        "batcher": lambda: batcher.run(FEED)["logits"],
        "pipeline": lambda: pipeline.submit(FEED).result()["logits"],
        "run_async": lambda: session.run_async(FEED).result()["logits"],
        "stream": lambda: [outputs["logits"] for outputs in session.stream([FEED] * 3)][-1],
    }
    expected = uses["run"]()
    for use in uses.values():
        use()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            session.run(FEED)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen[backend] = [fork(session, {**uses, "future": late.result}, expected)]
    thread = threading.Thread(target=lambda: seen[backend].append(fork(session, uses, expected)))
    thread.start()
    thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert all(np.allclose(use(), expected, atol=1e-5) for use in uses.values())  # the parent goes on
print(json.dumps(seen))
"""


@pytest.mark.parametrize("backends", [("null", "onnxruntime", "openvino"), ("eager", "aoti", "compile")], ids=" ".join)
def test_a_forked_child_uses_what_was_loaded_before(artifact_for: Callable[[str], Artifact], backends: tuple[str, ...]) -> None:
    arguments = [word for name in backends for word in (name, artifact_for(name).path)]
    done = subprocess.run([sys.executable, "-c", FORKS, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    right = {"status": 7, "run": True, "batcher": True, "pipeline": True, "run_async": True, "stream": True}
    late = "SessionError: the process was forked before this was answered: ask again in the child"
    assert json.loads(done.stdout.splitlines()[-1]) == {
        name: [{**right, "future": late}, {**right, "status": 0}] for name in backends
    }


ENDS = """
import os, signal, sys, threading, time

import numpy as np

import deploy

path, backend = sys.argv[1:]
FEED = {"input": np.zeros((32, 1, 28, 28), np.float32)}
STATUS = {"end": 0, "exit": 3, "exception": 1, "handler": 5, "SIGTERM": -signal.SIGTERM}

def work():
    # Everything that may be under way: queues in a batcher, a pipeline and run_async, half a stream, threads in runs.
    session = deploy.load(path, backend=backend, threads=2)
    batcher = deploy.Batcher(session, deploy.BatcherOptions(queue_rows=100_000))
    pipeline = deploy.Pipeline(batcher, dict, dict)
    stream = session.stream(FEED for _ in range(100))
    next(stream)
    futures = [each(FEED) for _ in range(500) for each in (batcher.submit, pipeline.submit, session.run_async)]

    def loop(use):
        while True:
            use(FEED)

    for use in (session.run, batcher.run):
        threading.Thread(target=loop, args=(use,), daemon=True).start()
    futures[0].result()
    return session, batcher, pipeline, stream, futures

for way, status in STATUS.items():
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        kept = work()
        if way == "exit":
            sys.exit(3)
        if way == "exception":
            raise RuntimeError("the program's own")
        if way in ("handler", "SIGTERM"):
            signal.signal(signal.SIGTERM, (lambda *_: sys.exit(5)) if way == "handler" else signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        break
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if found != status:
        print(f"{way}: {found}", flush=True)
"""


@pytest.mark.parametrize("backend", ["null", "onnxruntime", "openvino", "eager", "aoti"])
def test_a_program_with_work_queued_ends_with_its_own_status(artifact_for: Callable[[str], Artifact], backend: str) -> None:
    artifact = artifact_for(backend)
    command = [sys.executable, "-c", ENDS, str(artifact.path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith((" ", "Traceback"))]
    assert lines == ["RuntimeError: the program's own"]  # and no word of threads that were ended


@pytest.mark.parametrize("use", ["check", "run", "run_async", "stream", "submit", "pipeline"])
def test_at_the_end_of_the_program_a_thread_leaves_whatever_it_finds_closed(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    feed = {"input": np.zeros((1, 1, 28, 28), np.float32)}
    session = deploy.load(shared_lenet5, backend="null")
    batcher = deploy.Batcher(session)
    pipeline = deploy.Pipeline(batcher, dict, dict)
    uses = {
        "check": lambda: session.check(feed),
        "run": lambda: session.run(feed),
        "run_async": lambda: session.run_async(feed),
        "stream": lambda: next(stream),
        "submit": lambda: batcher.submit(feed),
        "pipeline": lambda: pipeline.submit(feed).result(),
    }
    stream = session.stream([feed, feed])
    next(stream)
    for each in (pipeline, batcher, session):
        each.close()
    with pytest.raises(deploy.DeployError, match="closed"):
        uses[use]()
    stream = session.stream([feed, feed])
    monkeypatch.setattr(lifetime, "_ender", -1)  # another thread ends the program
    with pytest.raises(SystemExit):
        uses[use]()
