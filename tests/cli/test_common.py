"""Progress on a terminal, and nowhere else."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest

from deploy.cli import common
from deploy.cli.show import megabytes
from deploy.progress import silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_appears_on_a_terminal_once_work_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(common, "_QUIET_S", 0.05)
    with common.progress_bar() as progress:
        progress("building", 3, 7)
        time.sleep(0.4)
    assert "building" in terminal.getvalue()
    assert "3/7" in terminal.getvalue()


def test_quick_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with common.progress_bar() as progress:
        progress("building", 3, 7)
    assert terminal.getvalue() == ""


def test_where_there_is_no_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with common.progress_bar() as progress:
        assert progress is silent


def test_a_terminal_sees_progress_and_standard_output_stays_clean() -> None:
    code = (
        "import time; from deploy.cli import common; common._QUIET_S = 0.05\n"
        "with common.progress_bar() as progress:\n"
        "    progress('exporting', 1, 2); time.sleep(0.5)\n"
        "print('done')"
    )
    parent, child = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=child, check=True, timeout=60)
    os.close(child)
    shown = os.read(parent, 100_000).decode()
    os.close(parent)
    assert "exporting" in shown
    assert done.stdout == b"done\n"


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (12_345, "12.3 kB"), (87_100_000, "87.1 MB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes_are_in_powers_of_ten(size: int, text: str) -> None:
    assert megabytes(size) == text
