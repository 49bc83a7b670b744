"""What several tests of the command line check with."""

import contextlib
import os
import pty
import subprocess
import sys
from typing import Any


def refused(finished: Any, status: int, *parts: str) -> None:
    assert finished.status == status, finished.err
    assert finished.err.strip().splitlines()[-1].startswith(("error: ", "Error: ")) or len(finished.err.splitlines()) > 1
    for part in parts:
        assert part in finished.err
    assert "Traceback" not in finished.err
    assert finished.out == ""


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
