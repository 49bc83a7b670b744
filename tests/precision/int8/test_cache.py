from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from deploy.artifact.manifest import Calibration
from deploy.precision.int8 import cache
from deploy.precision.int8.cache import Calibrated, CpuRanges
from deploy.precision.int8.smooth import Channels

REQUEST = {"parent": "a", "options": {"method": "max"}}
RECORD = Calibration(
    data="d", kind="images", rows=1, skipped=[], method="max", per_tensor=False, bias_correction=True, equalized=True,
    floats="fp32", layers=[],
)  # fmt: skip
CALIBRATED = Calibrated(
    joint={"a": 0.5},
    channels={"b": Channels(shift=np.array([0.1, -3], np.float32), scale=np.array([0.3, 8], np.float32))},
    scales={"x": 0.1, "y": float(np.float32(1 / 3))},
    bias={"conv": np.array([0.1, -2.5e-8], dtype=np.float32)},
    noisy={"weak": "its signal is faint"},
    keep={"big": "reaches 1e6"},
    cpu=CpuRanges(scales={"z": 0.3}, lows={"x": -0.1, "z": 0.0}),
    record=RECORD,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache.folder()


def test_a_calibration_comes_back_to_the_last_bit():
    cache.write(REQUEST, CALIBRATED)
    known = cache.read(REQUEST)
    assert known is not None
    for part in ("scales", "joint", "noisy", "keep", "cpu", "record"):
        assert getattr(known, part) == getattr(CALIBRATED, part)
    for part in ("shift", "scale"):
        read, kept = (getattr(each.channels["b"], part) for each in (known, CALIBRATED))
        assert (read.dtype, read.tobytes()) == (np.float32, kept.tobytes())
    assert known.bias["conv"].dtype == np.float32
    assert known.bias["conv"].tobytes() == CALIBRATED.bias["conv"].tobytes()


def test_another_request_has_another_calibration():
    cache.write(REQUEST, CALIBRATED)
    assert cache.read({**REQUEST, "parent": "b"}) is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"scales": []}'])
def test_a_damaged_file_is_no_calibration(folder, content):
    cache.write(REQUEST, CALIBRATED)
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert cache.read(REQUEST) is None


def test_skipped_images_whose_paths_are_not_utf8_are_kept():
    record = msgspec.structs.replace(RECORD, skipped=["images/caf\udce9.png"])
    cache.write(REQUEST, replace(CALIBRATED, record=record))
    known = cache.read(REQUEST)
    assert known is not None
    assert known.record == record
