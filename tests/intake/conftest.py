"""Projects of a user's that factories are imported from."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from deploy.intake.build import build_model


def write(folder: Path, **files: str) -> None:
    """`a__b="..."` writes folder/a/b.py."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py") if not name.endswith("init") else None
        path = path or folder.joinpath(*name.removesuffix("init").rstrip("_").split("__"), "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(spec: str, **args: object) -> list[str]:
    """Names of the source files of what is built, relative to the current folder."""
    built, _ = build_model(model=spec, args=args)
    for file in built.source_files:
        assert os.path.isabs(file.path)
        assert file.sha256 == sha256(Path(file.path).read_bytes()).hexdigest()
    return [os.path.relpath(file.path) for file in built.source_files]


@pytest.fixture(name="write", scope="session")
def write_fixture() -> Callable[..., None]:
    return write


@pytest.fixture(name="files", scope="session")
def files_fixture() -> Callable[..., list[str]]:
    return files


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
