"""The damages of units: what has been measured is kept, however the measuring ends."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model, save_model
from deploy.data.calibration_set import calibration_set
from deploy.data.evidence_feeds import first_rows
from deploy.errors import BackendError
from deploy.pipeline.stage import open_source
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import calibrate_onnx
from deploy.progress import silent
from deploy.runtime.session import SessionOptions
from deploy.tune import search
from deploy.tune.journal import Journal
from deploy.tune.measure import OnnxMixes, Place
from deploy.tune.search import Clock
from deploy.tune.units import Unit, units_of

UNITS = [Unit(name=f"unit{index}", nodes=(f"node{index}",), macs=(8 - index) / 36) for index in range(8)]


def measured(
    damage: Callable[[str, Sequence[str]], float], at_a_time: int, ended: type[BaseException] | None = None, minutes: float = 1.0
) -> dict[str, float]:
    """What is in the journal after the damages were measured, or after the error `ended`."""
    journal, made = Journal(None), SimpleNamespace(at_a_time=at_a_time, damage_alone=damage)
    args = UNITS, made, journal, Clock(minutes), silent
    if ended is None:
        search._measure_units(*args)  # type: ignore[arg-type]
    else:
        with pytest.raises(ended):
            search._measure_units(*args)  # type: ignore[arg-type]
    return dict(journal.damages)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_units_are_measured_so_many_at_a_time_each_without_the_others(at_a_time: int) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def damage(name: str, stay: Sequence[str]) -> float:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        (alone,) = {unit.nodes[0] for unit in UNITS} - set(stay)
        return float(alone.removeprefix("node"))

    assert measured(damage, at_a_time) == {unit.name: float(index) for index, unit in enumerate(UNITS)}
    assert most == at_a_time


@pytest.mark.parametrize("error", [BackendError("it does not run"), KeyboardInterrupt()])
def test_what_was_measured_before_an_error_is_kept_though_it_was_not_its_turn(error: BaseException) -> None:
    later = threading.Event()

    def damage(name: str, stay: Sequence[str]) -> float:
        if name == "alone2":
            later.wait(10)
            raise error
        if name == "alone4":
            later.set()
        return 1.0

    found = measured(damage, 2, type(error))
    assert {"unit0", "unit1", "unit3", "unit4"} <= found.keys()
    assert "unit2" not in found


def test_units_that_time_does_not_reach_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def damage(name: str, stay: Sequence[str]) -> float:
        time.sleep(0.2)
        return 1.0

    found = measured(damage, 2, minutes=0.5 / 60)
    assert 1 <= len(found) < len(UNITS)
    assert f"{len(UNITS) - len(found)} of {len(UNITS)} units are not measured" in caplog.text


def test_weights_in_a_file_beside_the_source_are_read_by_several_threads(net: Artifact, images: Path, tmp_path: Path) -> None:
    save_model(load_model(net.onnx_path), tmp_path / "net.onnx", external_over=0)
    source = open_source(tmp_path / "net.onnx")
    data = calibration_set(source, list(first_rows(calibration_set(net, images / "calib", 32), 2, 8)), 8)
    graph = calibrate_onnx(source, data, QuantizeOptions(min_share=0.0, keep_below=0.0), silent)
    place = Place.of(source, "onnxruntime", SessionOptions(threads=1), None)
    feeds = graph.feeds
    made = OnnxMixes(source, data, graph, place, feeds, "relative", tmp_path, silent)
    units, _ = units_of(graph.model, made.placement(), place.shapes(source))
    stay = [node for unit in units[1:] for node in unit.nodes]
    with search.ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda index: made.damage_alone(f"alone{index}", stay), range(24))]
    assert found[0] > 0
    assert found == [found[0]] * 24
