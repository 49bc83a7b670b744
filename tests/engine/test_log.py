"""What TensorRT says of its own work goes into the log, and not to the screen."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.engine.log import make_logger, start
from deploy.errors import BackendError


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None: ...


@pytest.mark.parametrize("severity", range(5))
def test_errors_are_kept_and_nothing_is_shown(severity: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "deploy")
    trt: Any = SimpleNamespace(ILogger=ILogger)
    log = make_logger(trt)
    log.log(severity, " (foreignNode) Converting conv activation scales to fp32.\n")
    kept = severity <= ILogger.ERROR
    assert log.last() == ("(foreignNode) Converting conv activation scales to fp32." if kept else "no reason was given")
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * (severity == ILogger.WARNING)


def test_what_cannot_start_is_an_error_with_tensorrts_reason() -> None:
    log = make_logger(tensorrt_rtx)  # type: ignore[arg-type]

    def refuse(log: Any) -> None:
        log.log(tensorrt_rtx.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")  # what the bindings raise for a null pointer

    assert start(tensorrt_rtx.Builder, log, "tensorrt-rtx") is not None
    with pytest.raises(BackendError, match=r"^tensorrt-rtx 1\.7 cannot start: CUDA initialization failure with error: 35$"):
        start(refuse, log, "tensorrt-rtx 1.7")


def test_each_thread_is_told_its_own_error_once() -> None:
    trt: Any = SimpleNamespace(ILogger=ILogger)
    log = make_logger(trt)
    log.log(ILogger.ERROR, "of the main thread")
    with ThreadPoolExecutor(1) as other:
        other.submit(log.log, ILogger.ERROR, "of the other").result()
        assert log.last() == "of the main thread"
        assert log.last() == "no reason was given"  # nothing new
        assert other.submit(log.last).result() == "of the other"
        other.submit(log.log, ILogger.ERROR, "of the other").result()
        assert log.last() == "of the other"  # better than nothing: TensorRT has threads of its own


def test_the_build_of_an_int8_engine_prints_our_lines_and_no_others(shared_lenet5: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for index in range(4):
        image = Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8))
        image.save(tmp_path / "images" / "ab"[index % 2] / f"{index}.png")
    build = ["build-trt", str(shared_lenet5.path), "--int8", "--fp16", "--calib", str(tmp_path / "images")]
    command = [sys.executable, "-m", "deploy", *build, "--flavour", "tensorrt-rtx", "-o", str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'engine'}: tensorrt-rtx ")
    assert all(line.startswith("  ") for line in lines)
