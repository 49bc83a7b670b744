import zipfile
from pathlib import Path

import numpy as np
import pytest

from deploy.calibration import imagefolder
from deploy.calibration.npzfolder import NpzFolderError, read, scan


def save(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_files_are_found_at_any_depth_and_sorted(tmp_path):
    names = ["b.npz", "a/2.NPZ", "a/1.npz", "c/d/0.npz"]
    for name in [*names, ".hidden.npz", ".git/x.npz"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in scan(tmp_path)] == ["a/1.npz", "a/2.NPZ", "b.npz", "c/d/0.npz"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(NpzFolderError, match=f"no folder at {tmp_path}/gone"):
        scan(tmp_path / "gone")
    with pytest.raises(NpzFolderError, match=r"x\.npz is not a folder"):
        scan(save(tmp_path / "x.npz", x=np.ones(1)))


def test_a_folder_without_feeds_says_what_belongs_there(tmp_path):
    with pytest.raises(NpzFolderError, match=r"holds nothing; expected one \.npz file a feed, with one array per model input"):
        scan(tmp_path)
    (tmp_path / "1.npy").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(NpzFolderError, match=r"holds 2 files, but none that ends in \.npz; expected"):
        scan(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refusing(path):  # root may read everything, so that permissions alone do not show it
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(imagefolder.os, "scandir", refusing)
    with pytest.raises(NpzFolderError, match=f"{tmp_path} cannot be read: Permission denied"):
        scan(tmp_path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_feed_has_one_array_per_name(tmp_path, write):
    feed = {
        "points": np.arange(6, dtype=np.float32).reshape(2, 3),
        "count": np.array(7),
        "layer/norm": np.ones((0, 2), np.float16),
    }
    write(tmp_path / "1.npz", **feed)
    found = read(tmp_path / "1.npz")
    assert list(found) == list(feed)
    for name, array in feed.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    path = save(tmp_path / "1.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(NpzFolderError, match=r"1\.npz cannot be read as arrays: Object arrays cannot be loaded"):
        read(path)


def test_every_damaged_file_is_named(tmp_path):
    whole = save(tmp_path / "whole.npz", x=np.arange(64, dtype=np.float32)).read_bytes()
    path = tmp_path / "damaged.npz"
    rng = np.random.default_rng(0)
    lengths = [0, 1, 4, *rng.integers(5, len(whole) - 1, size=40).tolist()]
    flipped = []
    for place in range(whole.index(b"NUMPY") + 130, whole.index(b"NUMPY") + 300, 10):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        flipped.append(bytes(damaged))
    for content in [*(whole[:length] for length in lengths), *flipped, b"not an archive", whole[:200] + whole[300:]]:
        path.write_bytes(content)
        with pytest.raises(NpzFolderError, match=r"damaged\.npz cannot be read as arrays: .+; write it with numpy\.savez"):
            read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NpzFolderError, match=r"gone\.npz cannot be read as arrays: .*No such file"):
        read(tmp_path / "gone.npz")


def test_a_file_without_named_arrays_is_refused(tmp_path):
    with pytest.raises(NpzFolderError, match=r"empty\.npz holds no named arrays; write it with numpy\.savez\(path, NAME=array"):
        read(save(tmp_path / "empty.npz"))
    np.save(tmp_path / "bare.npy", np.ones(3))
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    with pytest.raises(NpzFolderError, match=r"bare\.npz holds no named arrays; write"):
        read(tmp_path / "bare.npz")


def test_entries_that_are_no_arrays_are_named(tmp_path):
    path = save(tmp_path / "1.npz", x=np.ones(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(NpzFolderError, match=r"1\.npz holds entries that are no arrays: notes\.txt; write"):
        read(path)
