from pathlib import Path

import pytest

from deploy.host.compiler import cxx_compiler


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
