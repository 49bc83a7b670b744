"""Progress on a terminal, and nowhere else."""

import io
import re
import time

import pytest

from deploy.cli import common
from deploy.progress import silent
from tests.cli.helpers import on_a_terminal


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
    shown, out = on_a_terminal(code)
    assert "exporting" in shown
    assert out == b"done\n"


def test_no_count_is_shown_where_the_total_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(common, "_QUIET_S", 0.05)
    with common.progress_bar() as progress:
        progress("compiling")
        time.sleep(0.3)
    assert "compiling" in terminal.getvalue()
    assert not re.search(r"\d+/|/\?", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue()))
