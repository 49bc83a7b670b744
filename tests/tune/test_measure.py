"""The times of mixes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import load_model
from deploy.errors import ArtifactError
from deploy.evidence.disturbance import Measured, Round, Turn, Use
from deploy.runtime.session import SessionOptions
from deploy.tune import measure
from deploy.tune.measure import BASE, Place, Share, Stopwatch, is_faster, profiled
from deploy.tune.units import Unit


def children() -> set[int]:
    """The processes that this one has started and that have not been waited for."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_processes_are_kept_for_the_next_measurement_and_end_with_the_stopwatch(net: Artifact, shared_lenet5: Artifact) -> None:
    before = children()
    with Stopwatch(Place.of(net, "onnxruntime", SessionOptions(threads=1), None), {BASE: net}) as watch:
        first = watch.measure({"a": net, "b": shared_lenet5})
        started = children() - before
        second = watch.measure({"b": net, "a": shared_lenet5})
        third = watch.measure({"c": shared_lenet5})
        assert children() - before == started
    assert children() == before
    for ratio in (first.ratio("a", "b"), second.ratio("b", "a"), third.ratio(BASE, "c")):
        assert ratio.value < 0.9  # lenet5 takes longer than the net


def measured(times_s: dict[str, list[float]]) -> Measured[str]:
    """A round for each of the times, with five runs of that time."""
    use = Use(seconds=1.0, threads=1, cores=2, waited_s=0.0, others_s=0.0, stolen_s=0.0, step_s=0.0)
    return Measured(
        [
            Round({name: Turn(samples_s=[of[index]] * 5, use=use) for name, of in times_s.items()})
            for index in range(len(times_s[BASE]))
        ],
        quiet=True,
    )


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ([0.9] * 12, True),
        ([0.97, 0.98, 0.96] * 4, True),
        ([0.8, 1.1, 0.9, 1.05] * 3, None),  # as fast in half of the rounds
        ([1.0] * 12, False),
        ([1.2, 1.1, 1.15] * 4, False),
    ],
)
def test_a_mix_is_faster_where_the_rounds_show_it(mix: list[float], expected: bool | None) -> None:
    assert is_faster(measured({BASE: [1.0] * 12, "mix": mix}), "mix") is expected


@pytest.mark.parametrize(("share", "expected"), [(0.9, True), (1.2, False)])
def test_what_others_do_to_both_is_no_reason_for_doubt(share: float, expected: bool) -> None:
    slowed = [1.0, 1.0, 3.0] * 4
    found = measured({BASE: slowed, "mix": [share * time for time in slowed]})
    assert is_faster(found, "mix") is expected


def test_rounds_are_taken_until_they_are_precise_and_it_is_clear_what_they_show(
    net: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LONGEST_S", 20.0)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    errors = iter([0.1, 0.05, 0.01, 0.01, 0.01])
    said: list[float | str] = []

    def share(found: Measured[str], name: str) -> Share:
        said.append(next(errors))
        return Share(1.0, float(said[-1]))

    def is_clear(found: Measured[str]) -> bool:
        said.append("clear?")
        return said.count("clear?") == 3

    monkeypatch.setattr(measure, "time_share", share)
    with Stopwatch(Place.of(net, "onnxruntime", SessionOptions(threads=1), None), {BASE: net}) as watch:
        watch.measure({"a": net}, is_clear)
    assert said == [0.1, 0.05, 0.01, "clear?", 0.01, "clear?", 0.01, "clear?"]


def test_no_rounds_are_taken_after_the_longest_time(net: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    counts = []
    with Stopwatch(Place.of(net, "onnxruntime", SessionOptions(threads=1), None), {BASE: net}) as watch:
        found = watch.measure({"a": net}, lambda found: bool(counts.append(1)))
    assert counts == []
    assert len(found.rounds) <= measure.ROUNDS


def test_no_process_is_left_where_an_artifact_does_not_open(net: Artifact, lenet5: Artifact) -> None:
    (lenet5.path / ONNX).write_bytes(b"rubbish")
    place, before = Place.of(net, "onnxruntime", SessionOptions(threads=1), None), children()
    with Stopwatch(place, {BASE: net}) as watch, pytest.raises(ArtifactError):
        watch.measure({"a": net, "b": lenet5})
    with pytest.raises(ArtifactError):
        Stopwatch(place, {BASE: net, "b": lenet5})
    assert children() == before


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_profile_gives_each_unit_its_share_of_the_time(reference: Callable[[str], Artifact], backend: str) -> None:
    resnet = reference("resnet18")
    model = load_model(resnet.onnx_path)
    layers = [node.name or "" for node in model.graph if node.op_type in ("Conv", "Gemm")]
    half = len(layers) // 2
    units = [Unit(name=str(index), nodes=tuple(nodes), macs=0.5) for index, nodes in enumerate((layers[:half], layers[half:]))]
    sizes = {"batch": 1, "height": 64, "width": 64}
    place = Place(backend=backend, options=SessionOptions(threads=1), dims=sizes, batch=1)
    both, again = profiled([resnet, resnet], place, units, 3)
    assert both.shape == (2,)
    assert 0.6 < both.sum() <= 1
    assert both.min() > 0.1
    assert both == pytest.approx(again, abs=0.3)
    (half_known,) = profiled([resnet], place, [units[1], Unit(name="none", nodes=("of another",), macs=0.5)], 1)
    assert half_known[0] == pytest.approx(both[1], abs=0.3)
    assert half_known[1] == 0
