"""Regions of shared memory: registered by Triton's own utilities, never left, and never the server's end."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.utils.shared_memory as memory

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError, RefusedError
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.request import Place

KEY = f"/deploy_test_{os.getpid()}"
SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def regions() -> Iterator[Regions]:
    """Regions with one of 64 bytes, from byte 32 of an object of 128 bytes, called `r`."""
    handle = memory.create_shared_memory_region("r", KEY, 128, create_only=True)
    made = Regions(on=True)
    try:
        made.register("r", KEY, 32, 64)
        memory.set_shared_memory_region(handle, [X], offset=32 + 16)
        yield made
    finally:
        made.close()
        memory.destroy_shared_memory_region(handle)


def test_what_one_side_writes_the_other_reads(regions: Regions) -> None:
    place = Place(region="r", offset=16, size=32)
    np.testing.assert_array_equal(regions.read(place, SPEC, [2, 4]), X)
    regions.write(place, X[::-1])
    np.testing.assert_array_equal(regions.read(place, SPEC, [2, 4]), X[::-1])
    assert Path("/dev/shm", KEY[1:]).read_bytes() == b"\0" * 48 + X[::-1].tobytes() + b"\0" * 48


def test_a_place_that_is_not_inside_its_region_is_refused(regions: Regions) -> None:
    for offset, size in ((0, 65), (33, 32), (64, 1), (2**61, 4)):
        with pytest.raises(InputError, match="not inside region 'r'"):
            regions.check(Place(region="r", offset=offset, size=size))
    with pytest.raises(InputError, match="28 bytes of data; its shape takes 32"):
        regions.read(Place(region="r", offset=0, size=28), SPEC, [2, 4])
    with pytest.raises(InputError, match="the output has 32 bytes, and 28"):
        regions.write(Place(region="r", offset=0, size=28), X)
    with pytest.raises(InputError, match="no region 'q'"):
        regions.check(Place(region="q", offset=0, size=1))


def test_an_input_of_an_object_that_is_larger_than_the_memory_is_refused_before_it_is_read() -> None:
    huge, key = 1 << 41, f"{KEY}_huge"
    path = Path("/dev/shm", key[1:])
    path.touch()
    regions = Regions(on=True, most_bytes=1 << 20)
    try:
        os.truncate(path, huge)  # none of it is there
        regions.register("huge", key, 0, huge)
        for rows, error in ((2, InputError), (huge // 16, RefusedError)):
            with pytest.raises(error, match="has 2199023255552 bytes"):
                regions.read(Place(region="huge", offset=0, size=huge), SPEC, [rows, 4])
    finally:
        regions.close()
        path.unlink()


def test_an_object_that_its_owner_makes_smaller_is_an_error_and_no_more(regions: Regions) -> None:
    os.truncate(Path("/dev/shm", KEY[1:]), 40)
    for attempt in (
        lambda: regions.read(Place(region="r", offset=0, size=32), SPEC, [2, 4]),
        lambda: regions.write(Place(region="r", offset=0, size=32), X),
    ):
        with pytest.raises(InputError, match="has become smaller"):
            attempt()
    assert Path("/dev/shm", KEY[1:]).stat().st_size == 40


@pytest.mark.parametrize(
    "asked",
    [
        ("a/b", KEY, 0, 8), ("", KEY, 0, 8), (7, KEY, 0, 8), ("q", "/../etc/passwd", 0, 8), ("q", "..", 0, 8), ("q", "/a/b", 0, 8),
        ("q", None, 0, 8), ("q", KEY, -1, 8), ("q", KEY, True, 8), ("q", KEY, 0, 0), ("q", KEY, 0, "8"), ("q", KEY, 0, 129),
        ("q", KEY, 128, 1), ("q", KEY, 2**61, 2**61), ("q", "/nobody_made_this", 0, 8),
    ],
)  # fmt: skip
def test_what_cannot_be_a_region_is_refused(regions: Regions, asked: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        regions.register(*asked)
    assert [region.name for region in regions.status()] == ["r"]


def test_links_and_other_kinds_of_files_are_refused(regions: Regions, tmp_path: Path) -> None:
    link, pipe = Path(f"/dev/shm{KEY}_link"), Path(f"/dev/shm{KEY}_pipe")
    (tmp_path / "secret").write_bytes(b"secret")
    try:
        link.symlink_to(tmp_path / "secret")
        os.mkfifo(pipe)
        for path in (link, pipe):
            with pytest.raises(InputError):
                regions.register("q", f"/{path.name}", 0, 1)
    finally:
        link.unlink()
        pipe.unlink()


def test_regions_are_listed_and_forgotten(regions: Regions) -> None:
    assert [region.to_json() for region in regions.status("r")] == [{"name": "r", "key": KEY, "offset": 32, "byte_size": 64}]
    with pytest.raises(RefusedError, match="registered already"):
        regions.register("r", KEY, 0, 8)
    regions.unregister("q")
    regions.unregister()
    assert regions.status() == []
    with pytest.raises(RefusedError, match="no region 'r'"):
        regions.status("r")


def test_files_are_closed_whatever_happens(regions: Regions) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for asked in (("q", KEY, 0, 129), ("r", KEY, 0, 8)):
        with pytest.raises((InputError, RefusedError)):
            regions.register(*asked)
    regions.register("q", KEY, 0, 8)
    regions.unregister("q")
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_option_everything_is_refused() -> None:
    for attempt in (
        lambda: NO_REGIONS.register("r", KEY, 0, 8),
        NO_REGIONS.status,
        NO_REGIONS.unregister,
        lambda: NO_REGIONS.check(Place(region="r", offset=0, size=1)),
    ):
        with pytest.raises(RefusedError, match="--shared-memory"):
            attempt()
