"""What is kept between runs."""

import logging
import os
import stat
from pathlib import Path

import pytest

from deploy.host.cache import cache_folder, keep, trim


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "deploy"


def test_a_file_that_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(tmp_path / "a" / "file", b"content", "it")
    assert (tmp_path / "a" / "file").read_bytes() == b"content"
    (tmp_path / "taken").write_text("")
    with caplog.at_level(logging.WARNING, "deploy"):
        keep(tmp_path / "taken" / "file", b"content", "the thing")
    assert "the thing cannot be kept in" in caplog.text


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_what_is_kept_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        keep(tmp_path / "a" / "file", b"content", "it")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o777 & ~umask


def test_what_was_changed_longest_ago_is_removed_first_and_the_newest_stays(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "folder", "file", "oldest"]):
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
            (path / "part").write_bytes(b"x" * 100)
        else:
            path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    trim(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    trim(tmp_path, 350)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "folder", "file"}
    trim(tmp_path, 150)
    assert {path.name for path in tmp_path.iterdir()} == {"newest"}
    trim(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"newest"}
