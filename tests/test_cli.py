"""What all commands have in common: help that answers at once, the traceback of --debug, `python -m deploy`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize(
    "command", ["doctor", "export", "convert", "build-aoti", "build-trt", "inspect", "eval", "predict", "bench"]
)
def test_every_command_has_help_that_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['deploy', {command!r}, '--help']\n"
        "from deploy.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: deploy {command}")
    assert "--debug" in done.stdout
    assert done.stderr.strip() == ""


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    assert "Traceback" not in run("inspect", tmp_path / "no").err
    assert "Traceback" in run("inspect", tmp_path / "no", "--debug").err


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "deploy", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("deploy, version ")
