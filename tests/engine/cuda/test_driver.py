"""What the NVIDIA driver says of itself."""

from pathlib import Path

import pytest

from deploy.engine.cuda.driver import driver_version


def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr("deploy.engine.cuda.driver._FILE", file)
    assert driver_version() is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs)  Tue Sep 23\n")
    assert driver_version() == "580.95.05"
    file.write_text("")
    assert driver_version() is None
