"""What is measured is found again, and nothing else is."""

from pathlib import Path

import pytest

from deploy.artifact.manifest import Accuracy
from deploy.tune.journal import Journal, MeasuredMix, MeasuredTimes

TIMES = MeasuredTimes(mixes=[MeasuredMix(int8=["conv1"], share=0.6, error=0.01)], floating={"conv1": 0.9}, int8={"conv1": 0.8})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_second_search_has_what_the_first_measured_and_one_of_other_options_has_not() -> None:
    journal = Journal({"net": 1})
    journal.add_damage("conv1", 1e-3)
    journal.set_times(TIMES)
    found = Accuracy(images=10, top1=90.0, backend="onnxruntime")
    journal.add_accuracy({"files": {"model.onnx": "ab"}}, found)
    again = Journal({"net": 1})
    assert (again.damages, again.times) == ({"conv1": 1e-3}, TIMES)
    assert again.accuracy({"files": {"model.onnx": "ab"}}) == found
    assert again.accuracy({"files": {"model.onnx": "cd"}}) is None
    assert (Journal({"net": 2}).damages, Journal({"net": 2}).times) == ({}, None)


@pytest.mark.parametrize("content", [b"", b"{", b'{"damages": {"conv1": "little"}}', b'{"times": {}}', b'{"units": {}}', b"\xff"])
def test_a_damaged_file_is_as_good_as_none(content: bytes) -> None:
    journal = Journal({"net": 1})
    journal.add_damage("conv1", 1e-3)
    journal.set_times(TIMES)
    assert journal.path is not None
    journal.path.write_bytes(content)
    assert (Journal({"net": 1}).damages, Journal({"net": 1}).times) == ({}, None)


def test_of_data_that_can_be_read_only_once_nothing_is_kept(tmp_path: Path) -> None:
    journal = Journal(None)
    journal.add_damage("conv1", 1e-3)
    journal.set_times(TIMES)
    assert (journal.damages, journal.times) == ({"conv1": 1e-3}, TIMES)
    assert list(tmp_path.rglob("*.json")) == []
