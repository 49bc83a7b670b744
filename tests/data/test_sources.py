"""Files, folders, patterns and lists as paths, one by one in order."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from deploy.data.sources import check_sources, paths_of
from deploy.errors import DataError
from tests.memory import peak_bytes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/2.png", "b/10.jpg", "b/.hidden.png", "a/deep/1.png", "a/x.npz", "a/notes.md", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*sources: str) -> list[str]:
    check_sources(sources)
    return [str(path) for path in paths_of(sources)]


def test_folders_and_patterns_are_read_by_name_and_hidden_files_left_out(here: Path) -> None:
    assert names("a", "b") == ["a/x.npz", "a/deep/1.png", "b/10.jpg", "b/2.png"]
    assert names("*/*.png", "c.png", "a/*.npz") == ["b/2.png", "c.png", "a/x.npz"]
    assert names("[ab]") == ["a/x.npz", "a/deep/1.png", "b/10.jpg", "b/2.png"]


def test_a_list_is_as_it_is_written_and_its_paths_may_start_at_its_folder(here: Path) -> None:
    (here / "b/list.txt").write_text("c.png\r\n\n2.png\nb/10.jpg\nnone.png\n/abs/x.png", encoding="utf-8")
    expected = ["c.png", "b/2.png", "b/10.jpg", "none.png", "/abs/x.png"]
    assert names("b/list.txt") == expected
    for column in ("path", "file_name", "only"):
        parquet.write_table(pyarrow.table({column: expected}), "list.parquet")
        assert names("list.parquet") == expected
    parquet.write_table(pyarrow.table({"x": ["a"], "path": ["c.png"]}), "list.parquet")
    assert names("list.parquet") == ["c.png"]


def test_what_cannot_be_a_source_is_named_before_the_work(here: Path) -> None:
    (here / "bad.parquet").write_bytes(b"no parquet")
    parquet.write_table(pyarrow.table({"x": [1], "y": [2]}), "two.parquet")
    for source, message in (
        ("none.png", "nothing is at none.png"),
        ("none/*.png", "nothing is at none"),
        ("bad.parquet", "cannot be read as Parquet"),
        ("two.parquet", r"has the columns x, y; expected one called path or file_name"),
    ):
        with pytest.raises(DataError, match=message):
            check_sources([source])
    with pytest.raises(DataError, match="no source"):
        check_sources([])
    parquet.write_table(pyarrow.table({"path": [1]}), "numbers.parquet")
    with pytest.raises(DataError, match="which is no path"):
        names("numbers.parquet")


def test_a_long_list_takes_no_memory(here: Path) -> None:
    with (here / "long.txt").open("w") as file:
        file.writelines(f"images/{index}.png\n" for index in range(3_000))
    peak = peak_bytes(
        'assert sum(1 for _ in paths_of(["long.txt"])) == 3_000',
        before="from deploy.data.sources import paths_of",
    )
    assert peak < 1 << 18
