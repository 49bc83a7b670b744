"""Versions are known without importing anything, and without an installation of the package itself."""

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from deploy.host.versions import tool_versions, version_of, version_of_module, versions
from deploy.version import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture
def uninstalled(tmp_path: Path) -> dict[str, str]:
    """The environment of a process to which everything is installed but `deploy`, which it finds as a checkout."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            link = libraries / entry.name
            if not entry.name.startswith(("deploy", "__editable__")) and not link.exists():
                link.symlink_to(entry)
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{libraries}"}


def run(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-S", "-c", code]  # without site, and so without what the installation puts on the path
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_checkout_that_is_not_installed_makes_artifacts(uninstalled: dict[str, str], tmp_path: Path) -> None:
    assert run("from importlib import metadata; print(list(metadata.distributions(name='deploy')))", uninstalled) == "[]"
    code = f"import deploy; print(deploy.export({str(tmp_path / 'mlp')!r}, arch='mlp').manifest.tools['deploy'])"
    assert run(code, uninstalled) == __version__


def test_no_missing_distribution_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    assert set(tool_versions().values()) == {__version__, "unknown"}
    assert set(versions(("deploy", "no-such-distribution")).values()) == {
        ".".join(map(str, sys.version_info[:3])),
        __version__,
        None,
    }


@pytest.mark.parametrize(
    ("installed", "version"),
    [
        ({"onnxruntime": "1.2"}, "1.2"),
        ({"onnxruntime-gpu": "1.3"}, "1.3"),
        ({"onnxruntime": "1.2", "onnxruntime-gpu": "1.3"}, "1.2"),
        ({"onnxruntime-directml": "1.4"}, None),
    ],
)
def test_the_gpu_build_of_a_library_is_another_distribution(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], version: str | None
) -> None:
    def look_up(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", look_up)
    assert version_of("onnxruntime") == versions(("onnxruntime",))["onnxruntime"] == version
    assert tool_versions()["onnxruntime"] == (version or "unknown")


@pytest.mark.parametrize(
    ("module", "distribution"), [("numpy.linalg", "numpy"), ("PIL.Image", "pillow"), ("no_such_module", None)]
)
def test_the_version_of_a_module_is_that_of_its_distribution(module: str, distribution: str | None) -> None:
    assert version_of_module(module) == (metadata.version(distribution) if distribution else None)
