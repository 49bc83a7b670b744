"""What is measured is found again, and nothing else is."""

from pathlib import Path

import pytest

from deploy.artifact.manifest import Accuracy
from deploy.tune.journal import Journal, MeasuredUnit

UNIT = MeasuredUnit(alone=0.9, without=0.7, whole=0.6, error=0.01, damage=1e-3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_second_search_has_what_the_first_measured_and_one_of_other_options_has_not() -> None:
    journal = Journal({"net": 1})
    journal.add_unit("conv1", UNIT)
    found = Accuracy(images=10, top1=90.0, backend="onnxruntime")
    journal.add_accuracy({"files": {"model.onnx": "ab"}}, found)
    again = Journal({"net": 1})
    assert again.units == {"conv1": UNIT}
    assert again.accuracy({"files": {"model.onnx": "ab"}}) == found
    assert again.accuracy({"files": {"model.onnx": "cd"}}) is None
    assert Journal({"net": 2}).units == {}


@pytest.mark.parametrize("content", [b"", b"{", b'{"units": {"conv1": {"alone": "fast"}}}', b'{"unit": {}}', b"\xff"])
def test_a_damaged_file_is_as_good_as_none(content: bytes) -> None:
    journal = Journal({"net": 1})
    journal.add_unit("conv1", UNIT)
    assert journal.path is not None
    journal.path.write_bytes(content)
    assert Journal({"net": 1}).units == {}


def test_of_data_that_can_be_read_only_once_nothing_is_kept(tmp_path: Path) -> None:
    journal = Journal(None)
    journal.add_unit("conv1", UNIT)
    assert journal.units == {"conv1": UNIT}
    assert list(tmp_path.rglob("*.json")) == []
