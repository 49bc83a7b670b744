"""The file of tactic timings. TensorRT times only on a GPU: a fake holds lines where it holds timings."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from deploy.engine.timing_cache import save_timing_cache, use_timing_cache
from deploy.errors import OutputError, UsageError

HEADER = b"timings of this GPU"


class Cache:
    """As ITimingCache: what is combined is added."""

    def __init__(self, lines: set[bytes]) -> None:
        self.lines = lines

    def combine(self, input_cache: "Cache", ignore_mismatch: bool) -> bool:
        self.lines |= input_cache.lines
        return True

    def serialize(self) -> memoryview:
        return memoryview(b"\n".join([HEADER, *sorted(self.lines)]))


class Config:
    """As IBuilderConfig: content without the header is of another version, and not taken."""

    def __init__(self, own: set[bytes]) -> None:
        self._own = own
        self._cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        header, *lines = content.split(b"\n")
        return Cache(set(lines)) if header in (b"", HEADER) else None

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        assert self._cache is not None
        return Cache(self._cache.lines | self._own)


def build(path: Path, *lines: bytes) -> None:
    """As a build that times `lines`."""
    config: Any = Config(set(lines))
    cache = use_timing_cache(config, path)
    save_timing_cache(config, path)
    del cache


def lines(path: Path) -> set[bytes]:
    header, *found = path.read_bytes().split(b"\n")
    assert header == HEADER
    return set(found)


def test_timings_are_written_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "timings"
    build(path, b"conv")
    build(path, b"gemm")
    assert lines(path) == {b"conv", b"gemm"}


def test_builds_that_end_at_once_keep_the_timings_of_one_another(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    first: Any = Config({b"conv"})
    second: Any = Config({b"gemm"})
    caches = [use_timing_cache(config, path) for config in (first, second)]  # both read before either writes
    save_timing_cache(first, path)
    save_timing_cache(second, path)
    assert lines(path) == {b"conv", b"gemm"}
    assert len(caches) == 2


def _many(path: Path, name: bytes) -> None:
    for index in range(20):
        build(path, b"%s%d" % (name, index))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_many, args=(path, name)) for name in (b"a", b"b", b"c")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert lines(path) == {b"%s%d" % (name, index) for name in (b"a", b"b", b"c") for index in range(20)}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".timings.lock", "timings"]  # and no draft


def test_a_file_of_another_version_or_gpu_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    path.write_bytes(b"something else")
    with pytest.raises(UsageError, match="holds no timings of this version of TensorRT on this GPU"):
        build(path, b"conv")
    assert path.read_bytes() == b"something else"
    other: Any = Config({b"conv"})
    other.set_timing_cache = lambda cache, ignore_mismatch: False
    with pytest.raises(UsageError, match="holds no timings"):
        use_timing_cache(other, tmp_path / "new")


def test_a_place_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`timing_cache` .* cannot be read: Is a directory"):
        build(tmp_path, b"conv")
    (tmp_path / "file").write_text("")
    config: Any = Config({b"conv"})
    config.set_timing_cache(Cache(set()), ignore_mismatch=False)
    with pytest.raises(OutputError, match=r"`timing_cache` .* cannot be written: (Not a directory|File exists)"):
        save_timing_cache(config, tmp_path / "file" / "timings")
