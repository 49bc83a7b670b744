import os
import shutil
from pathlib import Path

import pytest

from deploy.host.compiler import cxx_compiler, is_static


def static_compiler(folder: Path, name: str) -> Path:
    """A g++ that links the C++ library statically, whatever it is asked."""
    made = folder / name
    made.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -static-libstdc++ "$@"\n', encoding="utf-8")
    made.chmod(0o755)
    return made


def test_a_machine_with_gcc_alone_has_no_cxx_compiler_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gcc", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cxx_compiler() is None
    monkeypatch.setenv("CXX", "clang++")
    assert cxx_compiler() == str(tmp_path / "clang++")


def test_a_compiler_that_links_statically_gives_way_to_gxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which("g++")
    assert found is not None
    named = static_compiler(tmp_path, "named-g++")
    assert is_static(str(named))
    assert not is_static(found)
    monkeypatch.setenv("CXX", str(named))
    assert cxx_compiler() == found
    monkeypatch.setenv("PATH", str(static_compiler(tmp_path, "g++").parent), prepend=os.pathsep)
    assert cxx_compiler() == str(named)  # there is no other


def test_what_compiles_nothing_is_not_called_static(tmp_path: Path) -> None:
    for body in ("exit 1", "exit 0"):
        broken = tmp_path / f"c++-{body[-1]}"
        broken.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        broken.chmod(0o755)
        assert not is_static(str(broken))
    assert not is_static(str(tmp_path / "missing"))
