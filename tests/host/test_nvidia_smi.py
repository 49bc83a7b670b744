"""nvidia-smi is a script on the path here, which answers what a test lays down and notes what it was asked."""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.errors import BackendError
from deploy.host.nvidia_smi import gpu_peak_bytes, gpu_state, gpu_watched, list_gpus, query, summed_up, throttled

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes an nvidia-smi that prints `answer` and exits with `status`, and goes on with it if asked to look again and again.

    Returns the file of the arguments of its last call.
    """
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(answer: str, status: int = 0) -> Path:
        (tmp_path / "answer").write_text(answer)
        again = f'case "$*" in *--loop-ms*) while cat {tmp_path}/answer; do sleep 0.02; done;; esac\n'
        command = tmp_path / "nvidia-smi"
        command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/answer\n{again}exit {status}\n')
        command.chmod(0o755)
        return tmp_path / "asked"

    return make


@pytest.fixture
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_rows_are_read_by_field(fake: Fake) -> None:
    asked = fake("NVIDIA A, 8.9\nNVIDIA B, 9.0\n")
    assert query("gpu", ("name", "compute_cap"), "--id=0") == [
        {"name": "NVIDIA A", "compute_cap": "8.9"},
        {"name": "NVIDIA B", "compute_cap": "9.0"},
    ]
    assert asked.read_text() == "--query-gpu=name,compute_cap --format=csv,noheader,nounits --id=0\n"


def test_gpus_are_listed_with_their_memory_where_it_is_reported(fake: Fake) -> None:
    fake("NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06\nNVIDIA GB10, 12.1, [N/A], 580.95\n")
    gpus, reason = list_gpus()
    assert reason is None
    assert gpus == [
        {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_mib": 81559, "driver": "580.65.06"},
        {"name": "NVIDIA GB10", "compute_capability": "12.1", "memory_mib": None, "driver": "580.95"},
    ]


def test_the_state_of_the_first_gpu_has_clocks_and_throttling(fake: Fake) -> None:
    asked = fake("NVIDIA L4, 580.65, 1500, 2040, 6251, 45, 30.12, 0x0000000000000004\n")
    state = gpu_state()
    assert state == {
        "name": "NVIDIA L4", "driver": "580.65", "sm_mhz": "1500", "sm_max_mhz": "2040", "memory_mhz": "6251", "celsius": "45",
        "watts": "30.12", "throttling": "0x0000000000000004",
    }  # fmt: skip
    assert throttled(state)
    assert asked.read_text().rstrip().endswith("--id=0")


@pytest.mark.parametrize(
    ("mask", "held"), [("0x0", False), ("0x1", False), ("0x3", False), ("0x8", True), ("0x5", True), ("[N/A]", False)]
)
def test_an_idle_gpu_is_not_throttled(mask: str, held: bool) -> None:
    assert throttled({"throttling": mask}) is held


BUSY = "NVIDIA L4, 580.65, {}, 2040, 6251, {}, {}, {}\n"


def test_a_gpu_is_watched_while_it_works(fake: Fake) -> None:
    asked = fake(BUSY.format(2040, 45, 30.12, "0x1") + BUSY.format(1500, 84, 71.5, "0x0000000000000024"))
    states: list[dict[str, str]] = []
    with pytest.raises(KeyboardInterrupt), gpu_watched("cuda:1", states):
        until(lambda: asked.is_file())
        time.sleep(0.2)
        raise KeyboardInterrupt  # what was seen until then stays
    assert asked.read_text().split()[2:] == ["--id=1", "--loop-ms=500"]
    found = summed_up(states)
    assert found is not None
    assert 0 < found["throttled"] < found["looks"] == len(states)
    assert {key: found[key] for key in found if key not in ("looks", "throttled")} == {
        "throttling": "0x24", "sm_mhz_least": 1500, "sm_mhz_most": 2040, "celsius_most": 84, "watts_most": 71.5,
    }  # fmt: skip


def test_all_reasons_are_told_together_and_numbers_that_are_none_are_left_out() -> None:
    states = [
        {"throttling": mask, "sm_mhz": "[N/A]", "celsius": "60", "watts": "[N/A]"} for mask in ("0x4", "0x1", "0x20", "[N/A]")
    ]
    assert summed_up(states) == {"looks": 4, "throttled": 2, "throttling": "0x24", "celsius_most": 60}


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nothing_is_watched_where_there_is_nothing(absent: None) -> None:
    states: list[dict[str, str]] = []
    with gpu_watched("cuda", states), gpu_watched(None, states):
        pass
    assert states == []
    assert summed_up(states) is None


@pytest.mark.parametrize(
    ("fails", "identity"), [("", "0000:3b:00.0"), ("cuInit", "1"), ("cuDeviceGet", "1"), ("libcuda.so.1", "1")]
)
def test_nvidia_smi_is_asked_for_the_gpu_that_cuda_means(
    fake: Fake, fails: str, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES=3,2 makes cuda:1 what nvidia-smi calls 2: the driver knows."""

    class Driver:
        def __init__(self, name: str) -> None:
            if name == fails:
                raise OSError(name)

        def cuInit(self, flags: int) -> int:
            return 100 * (fails == "cuInit")

        def cuDeviceGet(self, number: Any, index: int) -> int:
            number._obj.value = index
            return 101 * (fails == "cuDeviceGet")

        def cuDeviceGetPCIBusId(self, name: Any, size: int, number: Any) -> int:
            assert (size, number.value) == (13, 1)
            name.value = b"0000:3b:00.0"
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    asked = fake(BUSY.format(2040, 45, 30.12, "0x1"))
    assert gpu_state("cuda:1") is not None
    assert asked.read_text().rstrip().endswith(f"--id={identity}")


def test_the_memory_of_this_process_is_summed_over_the_gpus(fake: Fake) -> None:
    asked = fake(f"1, 500\n{os.getpid()}, 300\n{os.getpid()}, 200\n{os.getpid()}, [N/A]\n")
    assert gpu_peak_bytes() == 500 << 20
    assert "--query-compute-apps=pid,used_memory" in asked.read_text()


@pytest.mark.parametrize("answer", ["", "1, 500\n"])
def test_a_process_that_is_not_on_a_gpu_uses_no_memory_there(fake: Fake, answer: str) -> None:
    fake(answer)
    assert gpu_peak_bytes() is None


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18, "nvidia-smi failed: .*exit status 18"),
        (
            "Field is not supported\n",
            0,
            "nvidia-smi failed: it answered 'Field is not supported' when asked for name, compute_cap",
        ),
        ("a, b, c, d, e, f, g, h, i\n", 0, "nvidia-smi failed: it answered"),
    ],
)
def test_an_answer_that_is_none_is_the_reason(fake: Fake, answer: str, status: int, message: str) -> None:
    fake(answer, status)
    with pytest.raises(BackendError, match=message):
        query("gpu", ("name", "compute_cap"))
    gpus, reason = list_gpus()
    assert gpus == []
    assert reason is not None
    assert reason.startswith("nvidia-smi failed: ")
    assert gpu_state() is None
    assert gpu_peak_bytes() is None


def test_without_a_driver_it_is_said_what_can_still_be_done(absent: None) -> None:
    gpus, reason = list_gpus()
    assert gpus == []
    assert reason == "no NVIDIA driver here (nvidia-smi is not installed): engines can be built with tensorrt-rtx, not run"
    assert gpu_state() is None
    assert gpu_peak_bytes() is None


def test_a_driver_without_gpus_is_no_failure(fake: Fake) -> None:
    fake("")
    assert list_gpus() == ([], "nvidia-smi lists no GPU")
    assert gpu_state() is None
