"""The times of mixes."""

from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.errors import ArtifactError
from deploy.runtime.session import SessionOptions
from deploy.tune.measure import Place, Stopwatch


def children() -> set[int]:
    """The processes that this one has started and that have not been waited for."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_processes_are_kept_for_the_next_measurement_and_end_with_the_stopwatch(net: Artifact, shared_lenet5: Artifact) -> None:
    before = children()
    with Stopwatch(Place.of(net, "onnxruntime", SessionOptions(threads=1), None), {"fp32": net}) as watch:
        first = watch.measure({"a": net, "b": shared_lenet5}, 6, 0.02)
        started = children() - before
        second = watch.measure({"b": net, "a": shared_lenet5}, 6, 0.02)
        third = watch.measure({"c": shared_lenet5}, 6, 0.02)
        assert children() - before == started
    assert children() == before
    for ratio in (first.ratio("a", "b"), second.ratio("b", "a"), third.ratio("fp32", "c")):
        assert ratio.value < 0.9  # lenet5 takes longer than the net


def test_no_process_is_left_where_an_artifact_does_not_open(net: Artifact, lenet5: Artifact) -> None:
    (lenet5.path / ONNX).write_bytes(b"rubbish")
    place, before = Place.of(net, "onnxruntime", SessionOptions(threads=1), None), children()
    with Stopwatch(place, {"fp32": net}) as watch, pytest.raises(ArtifactError):
        watch.measure({"a": net, "b": lenet5}, 2, 0.01)
    with pytest.raises(ArtifactError):
        Stopwatch(place, {"fp32": net, "b": lenet5})
    assert children() == before
