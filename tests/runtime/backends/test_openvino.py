import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.backends.openvino import (
    OpenVinoSession,
    openvino,
)  # not by itself: imported so, it sends its usage statistics
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import import_backend, open_session
from deploy.runtime.session import SessionOptions


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deploy.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"the backend openvino needs openvino, .*pip install 'deploy\[cpu\]'"):
        import_backend(BACKENDS["openvino"])


IMPORT = """
import sys
import threading
from pathlib import Path

import deploy.runtime.backends.openvino

children = [path for path in Path("/proc/self/task").glob("*/children") if path.read_text()]
print("openvino" in sys.modules, "openvino_telemetry.main" in sys.modules, threading.active_count(), children)
import openvino_telemetry

print(hasattr(openvino_telemetry, "Telemetry"))
"""


def test_importing_the_backend_sends_no_usage_statistics_and_starts_no_process() -> None:
    pytest.importorskip("openvino_telemetry")
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["True False 1 []", "True"]


def test_fp32_means_fp32(shared_lenet5: Artifact) -> None:
    """On a CPU with bfloat16 arithmetic OpenVINO's own default would be off by some 1e-3 here."""
    x = np.random.default_rng(0).standard_normal((8, 1, 28, 28), dtype=np.float32)
    with open_session(shared_lenet5, "onnxruntime") as reference, open_session(shared_lenet5, "openvino") as session:
        np.testing.assert_allclose(session(x), reference(x), rtol=0, atol=1e-6)


def test_another_precision_is_used_when_asked_for_or_refused(shared_lenet5: Artifact) -> None:
    """Which of the two depends on the CPU; falling back to FP32 in silence is what must not happen."""
    x = np.random.default_rng(0).standard_normal((8, 1, 28, 28), dtype=np.float32)
    with open_session(shared_lenet5, "onnxruntime") as reference:
        expected = reference(x)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match="openvino cannot compute in bf16 on this CPU"):
            open_session(shared_lenet5, "openvino", SessionOptions(compute="bf16"))
        return
    with open_session(shared_lenet5, "openvino", SessionOptions(compute="bf16")) as session:
        error = np.abs(session(x) - expected).max()
    assert 1e-5 < error < 5e-2


def test_several_inputs_and_outputs_keep_their_names(pair: Artifact) -> None:
    feed = {"index": np.array([5, 7]), "x": np.random.default_rng(0).standard_normal((2, 4), dtype=np.float32)}
    with open_session(pair, "onnxruntime") as reference, open_session(pair, "openvino") as session:
        expected = reference.run(feed)
        results = session.run(feed)
    assert list(results) == ["y", "total", "same", "anchors"]
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-5, atol=1e-6)


def test_streams_run_side_by_side_and_agree(shared_lenet5: Artifact) -> None:
    feeds = [np.random.default_rng(seed).standard_normal((2, 1, 28, 28), dtype=np.float32) for seed in range(8)]
    with deploy.load(shared_lenet5, "openvino", contexts=2, threads=1) as session:
        assert session.concurrency == 2
        assert isinstance(session, OpenVinoSession)
        assert session._compiled.get_property("NUM_STREAMS") == 2
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 2
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(session, feeds))
    with deploy.load(shared_lenet5, "openvino") as session:
        assert session.concurrency == 1
        for x, result in zip(feeds, together, strict=True):
            np.testing.assert_allclose(result, session(x), rtol=1e-4, atol=1e-5)


CLOSED_ELSEWHERE = """
import os, signal, sys, threading
from pathlib import Path
from deploy.artifact.artifact import Artifact
from deploy.runtime.load import open_session

for _ in range(3):
    session = open_session(Artifact.open(Path(sys.argv[1])), "openvino")
    thread = threading.Thread(target=session.close)
    thread.start()
    thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_whose_session_was_closed_in_another_thread_still_handles_signals(shared_lenet5: Artifact) -> None:
    command = [sys.executable, "-c", CLOSED_ELSEWHERE, str(shared_lenet5.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
