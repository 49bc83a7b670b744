import itertools
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deploy.calibration import imagefolder
from deploy.calibration.imagefolder import ImageFolderError, batches, scan


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def number(path: Path) -> np.ndarray:
    """The number in the name of the file, as an image of one pixel."""
    return np.full((1, 1, 1), int(path.stem), dtype=np.float32)


def numbered(count: int) -> list[tuple[Path, int]]:
    return [(Path(f"{index}.png"), index % 3) for index in range(count)]


def test_folders_are_classes_and_everything_is_sorted(tmp_path):
    touch(tmp_path, "b/2.png", "b/1.JPG", "a/x.webp", "10/deep/er/z.tiff", "10/a.png")
    folder = scan(tmp_path)
    assert folder.classes == ("10", "a", "b")
    assert [(path.relative_to(tmp_path).as_posix(), label) for path, label in folder.samples] == [
        ("10/a.png", 0), ("10/deep/er/z.tiff", 0), ("a/x.webp", 1), ("b/1.JPG", 2), ("b/2.png", 2),
    ]  # fmt: skip
    assert folder.ignored == 0


def test_other_files_are_counted_and_hidden_ones_skipped(tmp_path):
    touch(
        tmp_path, "a/1.png", "a/notes.txt", "a/sub/labels.csv", "loose.png", "README", "a/.hidden.png", ".git/x.png", "a/.t/y.png"
    )
    folder = scan(tmp_path)
    assert (folder.classes, len(folder.samples), folder.ignored) == (("a",), 1, 4)


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "data/a/1.png", "elsewhere/2.png", "more/3.png")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "more")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/round").symlink_to(tmp_path / "data/a")
    folder = scan(tmp_path / "data")
    assert [path.relative_to(tmp_path).as_posix() for path, _ in folder.samples] == [
        "data/a/1.png",
        "data/a/more/3.png",
        "data/b/2.png",
    ]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ImageFolderError, match=f"no folder at {tmp_path}/gone"):
        scan(tmp_path / "gone")
    with pytest.raises(ImageFolderError, match=r"file\.png is not a folder"):
        scan(touch(tmp_path, "file.png") / "file.png")


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(ImageFolderError, match=r"holds nothing: images must lie in one folder a class, as .*/CLASS/image\.png"):
        scan(tmp_path)


def test_images_without_class_folders_say_where_they_belong(tmp_path):
    with pytest.raises(ImageFolderError, match="holds images, but no class folders: images must lie in one folder a class"):
        scan(touch(tmp_path, "1.png", "2.png"))
    with pytest.raises(ImageFolderError, match="holds no class folders: images must"):
        scan(touch(tmp_path / "text", "1.txt"))


def test_class_folders_without_images_are_named(tmp_path):
    touch(tmp_path, "cat/1.png", "dog/list.txt")
    (tmp_path / "emu").mkdir()
    with pytest.raises(ImageFolderError, match="without images: dog, emu; add images or remove"):
        scan(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "a/locked/2.png")
    real = imagefolder.os.scandir

    def refusing(path):  # root may read everything, so that permissions alone do not show it
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(imagefolder.os, "scandir", refusing)
    with pytest.raises(ImageFolderError, match="locked cannot be read: Permission denied"):
        scan(tmp_path)


def make(tmp_path: Path, **counts: int):
    return scan(touch(tmp_path, *(f"{name}/{index:03}.png" for name, count in counts.items() for index in range(count))))


def test_a_sample_is_balanced_over_the_classes(tmp_path):
    folder = make(tmp_path, a=50, b=50, c=3)
    assert Counter(label for _, label in folder.sample(9)) == {0: 3, 1: 3, 2: 3}
    assert Counter(label for _, label in folder.sample(21)) == {0: 9, 1: 9, 2: 3}
    assert sorted(Counter(label for _, label in folder.sample(8)).values()) == [2, 3, 3]


def test_a_sample_repeats_with_its_seed_and_begins_the_larger_one(tmp_path):
    folder = make(tmp_path, a=40, b=40)
    assert folder.sample(20, seed=1) == folder.sample(20, seed=1)
    assert folder.sample(20, seed=1) != folder.sample(20, seed=2)
    assert folder.sample(40, seed=1)[:20] == folder.sample(20, seed=1)
    assert len(set(folder.sample(60))) == 60
    assert list(folder.sample(80)) != list(folder.samples)


def test_a_sample_smaller_than_the_classes_favours_none(tmp_path):
    folder = make(tmp_path, a=2, b=2, c=2)
    assert {folder.sample(1, seed=seed)[0][1] for seed in range(20)} == {0, 1, 2}


def test_a_sample_of_more_than_there_are_is_all(tmp_path):
    folder = make(tmp_path, a=3, b=1)
    assert sorted(folder.sample(100)) == list(folder.samples)


def test_a_sample_of_nothing_is_refused(tmp_path):
    with pytest.raises(ImageFolderError, match="a sample of 0 images"):
        make(tmp_path, a=1).sample(0)


@pytest.mark.parametrize("workers", [None, 1, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_batches_keep_the_order_and_lose_nothing(count, workers):
    found = list(batches(numbered(count), number, 8, workers=workers))
    assert [len(labels) for _, labels in found[:-1]] == [8] * (len(found) - 1)
    images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(images.reshape(-1), np.arange(count))
    np.testing.assert_array_equal(labels, np.arange(count) % 3)


def test_images_that_come_in_any_order_leave_in_order():
    def slow(path: Path) -> np.ndarray:
        time.sleep(0.02 if int(path.stem) % 4 == 0 else 0)
        return number(path)

    found = np.concatenate([images.reshape(-1) for images, _ in batches(numbered(32), slow, 4, workers=4)])
    np.testing.assert_array_equal(found, np.arange(32))


def test_images_are_decoded_in_parallel():
    together = threading.Barrier(4, timeout=20)

    def load(path: Path) -> np.ndarray:
        together.wait()  # nobody passes before four have come
        return number(path)

    assert sum(len(labels) for _, labels in batches(numbered(16), load, 4, workers=4)) == 16


@pytest.mark.parametrize(
    ("sizes", "seconds", "alone"),
    [
        ([500], 0, True),
        ([4000, 100, 60_000], 0, True),
        ([60_000, 100, 5000], 0.002, False),
        ([9000], 0.002, False),
        ([500], 0.002, False),  # a small file that takes long
    ],
)
def test_small_files_are_loaded_by_one_thread_and_others_by_several(tmp_path, monkeypatch, sizes, seconds, alone):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    samples = [(tmp_path / f"{index}", 0) for index in range(48)]
    for (path, _), size in zip(samples, itertools.cycle(sizes)):
        path.write_bytes(bytes(size))
    threads = set()

    def load(path):
        threads.add(threading.current_thread())
        time.sleep(seconds)
        return np.zeros((1, 1, 1), np.float32)

    assert sum(len(labels) for _, labels in batches(samples, load, 12)) == len(samples)
    assert (len(threads - {threading.current_thread()}) == 1) == alone


@pytest.mark.parametrize(("batch_size", "bad"), [(16, [2]), (16, [0, 5, 7]), (5, [3, 4, 29]), (32, [*range(8, 17)])])
def test_of_images_that_a_thread_loads_at_once_only_the_broken_ones_are_left_out(batch_size, bad):
    skipped = []
    found = list(
        batches(numbered(30), broken(*bad), batch_size, workers=1, skip=lambda path, error: skipped.append(int(path.stem)))
    )
    assert skipped == bad
    assert np.concatenate([images.reshape(-1) for images, _ in found]).tolist() == [n for n in range(30) if n not in bad]


@pytest.mark.parametrize(("batch_size", "workers"), [(15, 1), (10, 2), (7, 3), (33, 2)])
def test_no_more_than_one_batch_is_loaded_ahead_of_what_was_delivered(batch_size, workers):
    loaded = []
    stream = batches(numbered(1000), lambda path: loaded.append(path) or number(path), batch_size, workers=workers)
    for count in range(1, 4):
        next(stream)
        time.sleep(0.05)
        assert len(loaded) <= batch_size * count + max(batch_size, 2 * workers) + 8  # and what a thread loads at once
    stream.close()


def test_images_are_decoded_no_further_ahead_than_one_batch():
    loaded: list[int] = []

    def load(path: Path) -> np.ndarray:
        loaded.append(int(path.stem))
        return number(path)

    stream = batches(numbered(1000), load, 10, workers=2)
    assert loaded == []
    for taken in (10, 20, 30):
        next(stream)
        time.sleep(0.1)
        assert taken <= len(loaded) <= taken + 10


def test_a_stream_that_is_closed_loads_nothing_more():
    loaded: list[Path] = []

    def load(path: Path) -> np.ndarray:
        loaded.append(path)
        time.sleep(0.05)
        return number(path)

    stream = batches(numbered(100), load, 20, workers=2)
    next(stream)
    stream.close()
    count = len(loaded)
    time.sleep(0.2)
    assert len(loaded) == count


def test_an_error_of_load_comes_through_and_names_the_file():
    def load(path: Path) -> np.ndarray:
        if path.stem == "13":
            raise KeyError("broken")
        return number(path)

    taken = []
    with pytest.raises(KeyError) as caught:
        taken.extend(labels for _, labels in batches(numbered(100), load, 5, workers=3))
    assert caught.value.__notes__ == ["while loading 13.png"]
    assert len(taken) == 2


def broken(*numbers: int):
    """As `number`, but for the images of these numbers, which cannot be loaded."""

    def load(path: Path) -> np.ndarray:
        if int(path.stem) in numbers:
            raise OSError(f"broken {path.stem}")
        return number(path)

    return load


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_images_that_cannot_be_loaded_are_left_out_and_reported_in_order(batch_size, workers):
    told: list[tuple[str, str]] = []
    bad = (0, 5, 6, 7, 39)
    found = list(
        batches(
            numbered(40),
            broken(*bad),
            batch_size,
            workers=workers,
            skip=lambda path, error: told.append((path.name, f"{type(error).__name__} {error}")),
        )
    )
    assert told == [(f"{index}.png", f"OSError broken {index}") for index in bad]
    assert [len(labels) for _, labels in found[:-1]] == [batch_size] * (len(found) - 1)
    images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    good = np.array([index for index in range(40) if index not in bad])
    np.testing.assert_array_equal(images.reshape(-1), good)
    np.testing.assert_array_equal(labels, good % 3)
    assert all(len(images) == len(labels) for images, labels in found)


def test_nothing_comes_where_no_image_can_be_loaded():
    told: list[Path] = []
    assert list(batches(numbered(10), broken(*range(10)), 4, skip=lambda path, _: told.append(path))) == []
    assert told == [path for path, _ in numbered(10)]


def test_what_skip_raises_ends_the_stream():
    def skip(path: Path, error: Exception) -> None:
        if path.stem == "13":
            raise ValueError("two are too many") from error

    taken = []
    with pytest.raises(ValueError, match="two are too many") as caught:
        taken.extend(labels for _, labels in batches(numbered(100), broken(3, 13, 50), 5, workers=3, skip=skip))
    assert caught.value.__cause__.__notes__ == ["while loading 13.png"]
    assert len(taken) == 2


def test_skip_is_told_in_the_thread_of_the_caller():
    threads: list[threading.Thread] = []
    list(batches(numbered(20), broken(3, 13), 5, workers=3, skip=lambda *_: threads.append(threading.current_thread())))
    assert threads == [threading.current_thread()] * 2


def test_images_are_decoded_no_further_ahead_when_some_are_skipped():
    loaded: list[int] = []

    def load(path: Path) -> np.ndarray:
        loaded.append(int(path.stem))
        return broken(*range(0, 1000, 2))(path)

    stream = batches(numbered(1000), load, 10, workers=2, skip=lambda *_: None)
    for taken in (20, 40, 60):
        next(stream)
        time.sleep(0.1)
        assert taken <= len(loaded) <= taken + 10


def test_images_of_other_sizes_are_not_skipped():
    def load(path: Path) -> np.ndarray:
        return np.zeros((1, 1, 2 if path.stem == "2" else 1), dtype=np.float32)

    with pytest.raises(ImageFolderError, match=r"2\.png gives an array of shape"):
        list(batches(numbered(4), load, 4, skip=lambda path, _: pytest.fail(f"skipped {path}")))


def test_images_of_different_sizes_name_both_files():
    def load(path: Path) -> np.ndarray:
        return np.zeros((1, 1, 2 if path.stem == "2" else 1), dtype=np.float32)

    with pytest.raises(ImageFolderError, match=r"2\.png gives an array of shape \(1, 1, 2\) and 0\.png one of \(1, 1, 1\)"):
        list(batches(numbered(4), load, 4))
    assert len(list(batches(numbered(4), load, 1))) == 4


def test_a_batch_size_of_zero_is_refused_at_once():
    with pytest.raises(ImageFolderError, match="batch size must be 1 or more, not 0"):
        batches(numbered(4), number, 0)


def test_records_of_several_arrays_are_joined_by_name_and_keep_their_dtypes():
    def load(path: Path) -> dict[str, np.ndarray]:
        return {"x": number(path), "n": np.array(int(path.stem), dtype=np.int64)}

    found = list(batches(numbered(5), load, 2))
    assert [(each["x"].shape, each["n"].shape, each["n"].dtype) for each, _ in found] == [
        ((size, 1, 1, 1), (size,), np.int64) for size in (2, 2, 1)
    ]
    assert np.concatenate([each["n"] for each, _ in found]).tolist() == list(range(5))
    assert np.concatenate([each["x"].reshape(-1) for each, _ in found]).tolist() == list(range(5))


def test_records_of_different_shapes_in_one_batch_name_the_array():
    with pytest.raises(ImageFolderError, match=r"1\.png gives an array of shape \(2,\) for 'n' and 0\.png one of \(1,\)"):
        list(batches(numbered(4), lambda path: {"n": np.zeros(int(path.stem) + 1)}, 4))


def test_other_files_than_images_may_be_what_lies_in_the_folders(tmp_path):
    touch(tmp_path, "a/0.npz", "a/0.png", "b/1.NPZ")
    assert [path.name for path, _ in scan(tmp_path, frozenset((".npz",))).samples] == ["0.npz", "1.NPZ"]
    touch(tmp_path, "c/0.png")
    with pytest.raises(ImageFolderError, match=r"class folders without \.npz files: c"):
        scan(tmp_path, frozenset((".npz",)))
