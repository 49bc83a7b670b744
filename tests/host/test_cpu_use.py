"""What the kernel counts of the processors."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.host import cpu_use
from deploy.host.cpu_use import take_reading
from tests.processors import SCHEDSTAT, stat


def files(patch: pytest.MonkeyPatch, machine: str | None, thread: str | None) -> None:
    """Let /proc/stat and the schedstat of every thread hold these texts; None: there is no such file."""

    def text(path: str) -> str:
        found = machine if path == "/proc/stat" else thread if path.endswith("schedstat") else ""
        if found is None:
            raise FileNotFoundError(path)
        return found

    patch.setattr(cpu_use, "proc_text", text)


def test_idle_and_stolen_time_are_those_of_our_processors_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = len(os.sched_getaffinity(0))
    files(monkeypatch, stat(0), SCHEDSTAT)
    before = take_reading(os.getpid())
    files(monkeypatch, stat(2, 0.5), SCHEDSTAT)
    after = take_reading(os.getpid())
    assert before.idle_s is not None
    assert after.idle_s is not None
    assert before.idle_s == pytest.approx(cpus * (14369.23 + 140.76))  # waiting for a disk is idle too
    assert after.idle_s - before.idle_s == pytest.approx(2 * cpus)
    assert (after.stolen_s or 0) - (before.stolen_s or 0) == pytest.approx(0.5 * cpus)
    assert before.waited_s == dict.fromkeys(cpu_use._threads(os.getpid()), pytest.approx(0.318722104))
    assert after.cpus == cpus
    assert before.at_s < after.at_s


@pytest.mark.parametrize(
    "machine",
    [
        None,
        "cpu  10 0 10 10 0 0 0 0 0 0\ncpu4097 10 0 10 10 0 0 0 0 0 0\n",  # other processors than ours, as in lxcfs
        "".join(f"cpu{cpu} 0 0 0 0 0 0 0 0 0 0\n" for cpu in os.sched_getaffinity(0)),  # gVisor
        "".join(f"cpu{cpu} 1 0 1 9\n" for cpu in os.sched_getaffinity(0)),  # a very old kernel
    ],
)
@pytest.mark.parametrize("thread", [None, "0 0 0\n"])
def test_what_is_not_counted_is_none(monkeypatch: pytest.MonkeyPatch, machine: str | None, thread: str | None) -> None:
    files(monkeypatch, machine, thread)
    found = take_reading(os.getpid())
    assert (found.idle_s, found.stolen_s, found.waited_s) == (None, None, None)
    assert found.used_s[os.getpid()] > 0


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_our_own_time_holds_ended_threads_and_the_processes_we_started() -> None:
    before = take_reading(os.getpid())
    thread = threading.Thread(target=burn, args=(0.05,))
    thread.start()
    thread.join()
    program = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = take_reading(child.pid)
        child.communicate(b"\n")
    assert after.used_s[os.getpid()] - before.used_s[os.getpid()] >= 0.05
    assert child.pid not in before.used_s
    if Path(f"/proc/self/task/{os.getpid()}/children").exists():
        assert after.used_s[child.pid] >= 0.29
    assert after.waited_s is None or child.pid in after.waited_s


def test_a_process_that_is_gone_has_no_threads_and_no_time() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert take_reading(child.pid).waited_s is None
    assert cpu_use._used_s(child.pid) is None


def test_waiting_for_a_processor_is_counted_where_the_kernel_does() -> None:
    """Three programs that compute on one processor: the watched one waits for about two thirds of the time."""
    if take_reading(os.getpid()).waited_s is None:
        pytest.skip("this kernel does not count the waits of threads")
    one = str(min(os.sched_getaffinity(0)))
    program = f"import os\nos.sched_setaffinity(0, {{{one}}})\nprint(flush=True)\nwhile True: pass"
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        waited: Callable[[], float] = lambda: sum((take_reading(children[0].pid).waited_s or {}).values())  # noqa: E731
        before, start = waited(), time.monotonic()
        time.sleep(0.4)
        assert (waited() - before) / (time.monotonic() - start) > 0.3
    finally:
        for child in children:
            child.kill()
            child.communicate()
