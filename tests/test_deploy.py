"""The names of the package, which are loaded when they are first used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deploy


@pytest.mark.parametrize("name", deploy.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(deploy, name) is getattr(deploy, name)
    assert name in dir(deploy)


def test_a_name_that_it_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'deploy' has no attribute 'lod'"):
        deploy.lod  # noqa: B018


@pytest.mark.parametrize("library", ["torch", "onnx"])
def test_a_name_whose_library_is_missing_says_what_to_install(library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import deploy; deploy.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    said = f"deploy.export needs {library}, which is not installed: pip install 'deploy[export]'"
    assert done.stderr.splitlines()[-1].endswith(said)


def test_names_that_need_no_torch_do_without_it() -> None:
    code = "import sys; sys.modules['torch'] = None; import deploy; deploy.load, deploy.Batcher, deploy.evaluate, deploy.predict"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_the_usage_statistics_of_onnxruntime_are_off_before_it_is_imported_unless_they_are_asked_for(
    given: str | None, kept: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    code = "import os, sys, deploy.cli; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [kept, "False"]


def test_onnxruntime_keeps_no_device_id_and_no_thread_that_sends(tiny_onnx: Path, tmp_path: Path) -> None:
    code = f"""
import os, time, deploy
with deploy.load({str(tiny_onnx)!r}, "onnxruntime", threads=1):
    time.sleep(0.2)
    print(*sorted(open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")))
"""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OPENBLAS_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environment, **home})
    assert len(done.stdout.split()) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
