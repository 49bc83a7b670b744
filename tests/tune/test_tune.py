"""The whole way on a small network."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest
from deploy.artifact.summary import summary
from deploy.artifact.tuning import Tuning
from deploy.errors import BackendError, DataError, ParityError, UsageError
from deploy.evaluation.options import METRICS
from deploy.pipeline.quantize import QuantizeStage
from deploy.runtime.session import SessionOptions
from deploy.tune import search
from deploy.tune import tune as stage
from deploy.tune.measure import OnnxMixes, Place
from deploy.tune.page import render
from deploy.tune.text import text
from deploy.tune.tune import tune
from tests.tune.conftest import small_net

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of these tests alone, with what the first search measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def search_of(net: Artifact, data: Path, out: Path, **options: Any) -> Artifact:
    given = {"calib": data / "calib", "eval_folder": data / "eval", "max_drop": 40, "backend": "onnxruntime", **options}
    return tune(net, out, **given)


@pytest.fixture(scope="module")
def tuned(net: Artifact, images: Path, quick: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return search_of(net, images, tmp_path_factory.mktemp("tuned") / "tuned")


def record(artifact: Artifact) -> Tuning:
    assert artifact.manifest.tuning is not None
    return artifact.manifest.tuning


def test_the_result_is_byte_for_byte_what_was_tested_and_its_manifest_has_the_evidence(tuned: Artifact, net: Artifact) -> None:
    found = record(tuned)
    assert [unit.name for unit in found.units] == ["stem", "body", "head"]
    assert [unit.nodes for unit in found.units] == [["stem/Conv"], ["body/Conv", "Add", "pool"], ["head/Gemm"]]
    assert all(unit.floating_time and unit.int8_time and unit.damage is not None for unit in found.units)
    tested = [point for point in found.points if point.left_out is None]
    assert [point.verdict for point in tested] == ["inside"] * len(tested)
    assert [point.damage for point in tested] == sorted(point.damage or 0 for point in tested)
    result = next(point for point in found.points if point.name == found.result)
    assert result is tested[-1]
    written = {path.name: file_digest(path) for path in tuned.path.iterdir() if path.name != "manifest.json"}
    assert result.files.items() <= written.items()
    assert set(written) - set(result.files) <= {"model.cpu.onnx"}  # of ONNX Runtime with VNNI, where it was not tuned
    assert "model.onnx" in written
    assert {unit.name for unit in found.units if unit.int8} == set(result.int8)
    assert (tuned.manifest.precision, found.stopped) == ("int8", None)
    assert tuned.manifest.accuracy is not None
    assert tuned.manifest.accuracy.top1_drop == result.loss
    assert tuned.manifest.parity is not None
    tuned.verify()
    assert tuned.root().manifest.digest == net.manifest.digest
    assert f"tuned      {result.name}: " in summary(tuned)


def test_the_search_decides_on_layers_that_quantize_leaves_in_floating_point_for_their_noise(
    images: Path, tmp_path: Path
) -> None:
    planted = small_net(tmp_path / "planted", 1000)
    made = deploy.quantize(planted, tmp_path / "int8", calib=images / "calib", min_share=0)
    assert [each.node for each in made.manifest.exclusions] == ["body/Conv"]
    found = record(search_of(planted, images, tmp_path / "tuned"))
    assert [unit.name for unit in found.units] == ["stem", "body", "head"]


def test_everything_in_int8_is_what_quantize_makes(tuned: Artifact, net: Artifact, images: Path, tmp_path: Path) -> None:
    made = deploy.quantize(net, tmp_path / "int8", calib=images / "calib")
    plain = next(point for point in record(tuned).points if point.name == "int8")
    assert plain.files.items() <= {name: file.sha256 for name, file in made.manifest.files.items()}.items()
    assert "model.onnx" in plain.files


def test_a_search_that_is_repeated_measures_nothing_again_and_comes_to_the_same_files(
    tuned: Artifact, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_times", lambda *given: pytest.fail("the units were timed again"))
    monkeypatch.setattr(OnnxMixes, "damage_alone", lambda *given: pytest.fail("a unit was measured again"))
    monkeypatch.setattr("deploy.evaluation.gate.Reference.compared", lambda *given: pytest.fail("a file was tested again"))
    again = search_of(net, images, tmp_path / "again", minutes=5.0)

    def what_was_found(found: Tuning) -> list[Any]:
        return [
            (point.name, point.int8, point.files, point.predicted, point.damage, point.verdict, point.loss)
            for point in found.points
        ]

    assert what_was_found(record(again)) == what_was_found(record(tuned))
    assert record(again).units == record(tuned).units
    assert search_of(net, images, tmp_path / "again", minutes=5.0).manifest.created == again.manifest.created


def test_where_no_mix_passes_the_result_is_the_artifact_in_floating_point_and_when_time_is_over_the_rest_is_guessed(
    net: Artifact, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = search_of(net, images, tmp_path / "out", metric="sqnr", max_drop=None, min_sqnr=190.0, minutes=1e-6)
    found = record(made)
    assert (found.result, made.manifest.precision, found.stopped) == ("fp32", "fp32", "minutes")
    assert re.match(
        r"no mix is shown to keep within SQNR 190: (int8|mix 1), the safest that was tested, has \d+\.\d+ dB", found.because
    )
    assert [point.verdict for point in found.points] == ["outside", *[None] * (len(found.points) - 1)]
    assert made.onnx_path.read_bytes() == net.onnx_path.read_bytes()
    made.verify()
    assert [(unit.int8, unit.damage) for unit in found.units] == [(False, None)] * 3
    assert "3 of 3 units are not measured: their damages are guessed" in caplog.text
    assert "time ran out (--minutes): what was measured is kept" in text(made)
    assert render(made).count("not measured") == 3
    wild = replace(found, points=[replace(point, predicted=-1.0, speedup=1.0, low=1.0, high=1.0) for point in found.points])
    assert "nan" not in render(Artifact(made.path, replace(made.manifest, tuning=wild)))
    with deploy.load(made, "onnxruntime") as session:
        assert session.backend == "onnxruntime"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "eager"}, "mixes cannot be measured on eager: name a backend that runs ONNX files or engines"),
        ({"backend": "null"}, "mixes cannot be measured on null"),
        ({"backend": "openvinno"}, "unknown backend 'openvinno'"),
        ({"max_drop": 0.5}, r"64 images of .*eval cannot show that at most 0\.5 points are lost.*: give [\d,]+ or more"),
        ({"min_sqnr": 20.0}, "`min_sqnr` is of `metric` sqnr"),
        ({"minutes": 0.0}, "`minutes` must be more than 0"),
        ({"batch": 0}, "`batch` must be 1 or more"),
        ({"metric": METRICS[2]}, "expected|takes|gives"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    net: Artifact, images: Path, tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tune.tune.calibrate_onnx", lambda *given: pytest.fail("the work began"))
    with pytest.raises((UsageError, DataError), match=message):
        search_of(net, images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(tuned: Artifact, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is int8 already; give the FP32 artifact that it was made from"):
        search_of(tuned, images, tmp_path / "out")


@pytest.mark.parametrize(
    "speeds", [(1.1, 1.2, 1.3), (1.5, 1.4, 1.3)], ids=["the next best", "one that was slower, and not tested"]
)
def test_a_mix_that_quantize_would_refuse_is_left_out_for_another(
    net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, ...]
) -> None:
    write, timed, refused = QuantizeStage.write, stage.time_points, []

    def refusing(*given: Any) -> Any:
        if not refused:
            refused.append(True)
            raise ParityError("it is too far off")
        return write(*given)

    def with_speeds(*given: Any) -> Any:
        found, p50_ms = timed(*given)
        return [each.found(speedup=speed) for each, speed in zip(found, speeds, strict=True)], p50_ms

    monkeypatch.setattr(QuantizeStage, "write", refusing)
    monkeypatch.setattr(stage, "time_points", with_speeds)
    monkeypatch.setattr(search, "mixes", lambda costs, pairs: [np.array([True, False, False]), np.array([True, True, False])])
    made = search_of(net, images, tmp_path / "out")
    found = record(made)
    expected = [0, 1] if speeds[0] > speeds[1] else [2, 1]
    left, result = (found.points[index] for index in expected)
    assert (left.verdict, left.left_out) == ("inside", "it is too far off")
    assert (result.verdict, result.left_out, result.name) == ("inside", None, found.result)
    assert made.manifest.parity is not None
    assert f"{left.name} ({len(left.int8)} unit{'s' * (len(left.int8) > 1)} in INT8) was left out: it is too far off" in text(
        made
    )


@pytest.mark.parametrize("profile", ["none", "of other nodes"])
def test_without_a_profile_units_have_the_time_of_their_work(
    net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, profile: str
) -> None:
    def profiled(artifacts: Any, place: Any, units: Any, times: Any) -> Any:
        if profile == "none":
            raise BackendError("it has no profiler")
        return [np.zeros(len(units)) for _ in artifacts]

    monkeypatch.setattr(search, "profiled", profiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = search_of(net, images, tmp_path / "out")
    assert [(unit.floating_time, unit.int8_time) for unit in record(made).units] == [(None, None)] * 3
    assert "units have the time of their multiply-accumulates: " in caplog.text
    assert '<td data-name="in INT8"></td>' in render(made)


def test_an_interruption_while_the_result_is_built_keeps_what_was_tested(
    net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "prove", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        search_of(net, images, tmp_path / "out")
    assert "what has been measured and tested is kept: the same command goes on" in caplog.text
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("deploy.evaluation.gate.Reference.compared", lambda *given: pytest.fail("a file was tested again"))
    assert record(search_of(net, images, tmp_path / "out")).result != "fp32"


def test_images_without_classes_need_a_metric_that_needs_no_labels(net: Artifact, images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "eval").rglob("*.png"):
        shutil.copyfile(path, flat / path.name)
    with pytest.raises(DataError, match=r"no class folders: .*; or take `metric` sqnr or cosine, which need no labels"):
        search_of(net, images, tmp_path / "out", eval_folder=flat)


def test_a_fixed_batch_is_timed_at_no_other(net: Artifact) -> None:
    spec = net.manifest.inputs[0]
    fixed = Artifact(net.path, replace(net.manifest, inputs=[dataclasses.replace(spec, shape=(4, *spec.shape[1:]))]))
    assert Place.of(net, "onnxruntime", SessionOptions(), 3).shapes(net) == {"x": (3, 1, 12, 12)}
    assert [Place.of(fixed, "onnxruntime", SessionOptions(), batch).batch for batch in (None, 4)] == [4, 4]
    with pytest.raises(UsageError, match="has a fixed batch of 4: it cannot be timed at `batch` 3"):
        Place.of(fixed, "onnxruntime", SessionOptions(), 3)
