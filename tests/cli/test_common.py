"""Progress on a terminal, and nowhere else."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from deploy.cli import common
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


def on_a_terminal(code: str) -> tuple[str, bytes]:
    """What the program shows on standard error, which is a terminal, and what it writes to standard output."""
    parent, child = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=child) as process:
        os.close(child)
        shown = b""
        with contextlib.suppress(OSError):  # all at the other end have closed it
            while part := os.read(parent, 1 << 16):
                shown += part
        os.close(parent)
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0, shown.decode()
    return shown.decode(), out


def test_a_terminal_sees_progress_and_standard_output_stays_clean() -> None:
    code = (
        "import time; from deploy.cli import common; common._QUIET_S = 0.05\n"
        "with common.progress_bar() as progress:\n"
        "    progress('exporting', 1, 2); time.sleep(0.5)\n"
        "print('done')"
    )
    shown, out = on_a_terminal(code)
    assert "exporting" in shown
    assert out == b"done\n"


def test_log_lines_come_out_whole_above_the_bar() -> None:
    code = (
        "import logging, time; from deploy.cli import common; from deploy.cli.log import show_log\n"
        "common._QUIET_S = 0.05; show_log()\n"
        "with common.progress_bar() as progress:\n"
        "    progress('exporting [net]')\n"
        "    for index in range(3):\n"
        "        time.sleep(0.3)\n"
        "        logging.getLogger('deploy.x').warning('line [bold]%d of%s end', index, ' some words' * 20)\n"
        "    progress('exporting', 1, 2); time.sleep(0.2)\n"
        "logging.getLogger('deploy.x').info('after')"
    )
    shown, _ = on_a_terminal(code)
    assert "exporting [net]" in shown
    # What stays on the screen: of every line, that which follows the last return to its start and erasure.
    lines = [line.rpartition("\x1b[2K")[2] for line in shown.replace("\r\n", "\n").splitlines()]
    for index in range(3):
        assert f"warning: line [bold]{index} of{' some words' * 20} end" in lines
    assert lines[-1].endswith("after")
    assert "1/2" in shown


def test_no_count_is_shown_where_the_total_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(common, "_QUIET_S", 0.05)
    with common.progress_bar() as progress:
        progress("compiling")
        time.sleep(0.3)
    assert "compiling" in terminal.getvalue()
    assert not re.search(r"\d+/|/\?", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue()))
