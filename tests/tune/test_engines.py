"""Mixes that run as engines, on the simulated GPU. TensorRT's parser reads every typed file; the engine is that file, on ONNX Runtime."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Target
from deploy.artifact.summary import summary
from deploy.artifact.tensors import Profile
from deploy.artifact.tuning import Tuning
from deploy.engine.builder import BuiltEngine
from deploy.engine.flavour import Flavour
from deploy.engine.network import parse_network
from deploy.errors import AccuracyError, BackendError, EngineError, UsageError
from deploy.pipeline import build_trt
from deploy.precision.int8.quantize import CalibratedGraph
from deploy.runtime.load import open_session
from deploy.tune import engines
from deploy.tune.page import render
from deploy.tune.text import text
from deploy.tune.tune import tune
from tests.simulator.plans import make_plan
from tests.simulator.simulated import Simulated

pytestmark = pytest.mark.usefixtures("quick")

TARGET = Target(flavour="tensorrt", version="11.4.0", gpu="Simulated GPU", compute_capability="8.9", targets=["8.9"])


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Simulated]:
    """A GPU for which engines are built, see `build`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Simulated(monkeypatch)
    monkeypatch.setattr(build_trt, "has_gpu", lambda: True)
    monkeypatch.setattr(engines, "build_engine", build)
    yield found
    found.finish()


def build(flavour: Flavour, path: Path, profiles: Sequence[Profile], *given: Any, shown: str) -> BuiltEngine:
    network = parse_network(flavour, path, shown=shown)
    ranges = [{name: (sides.min, sides.opt, sides.max) for name, sides in profile.items()} for profile in profiles]
    return BuiltEngine(plan=make_plan(path.read_bytes(), ranges), network=network, target=TARGET)


def search_of(net: Artifact, data: Path, out: Path, **options: Any) -> Artifact:
    layers = ("stem/Conv", "body/Conv", "head/Gemm")  # too small for what is fast in an engine
    given = {"calib": data / "calib", "eval_folder": data / "eval", "max_drop": 40, "backend": "tensorrt", "include": layers}
    given |= options
    return tune(net, out, **given)


def record(artifact: Artifact) -> Tuning:
    assert artifact.manifest.tuning is not None
    return artifact.manifest.tuning


def types(path: Path) -> dict[str, set[int]]:
    """The element types of the initializers, by the name of the node that reads each."""
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {node.name: {kinds[name] for name in node.input if name in kinds} for node in graph.node}


def reading_codes(path: Path) -> set[str]:
    """The layers of a Q/DQ graph that read codes."""
    graph = onnx.load(path).graph
    codes = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    return {node.name for node in graph.node if node.op_type in ("Conv", "Gemm") and not codes.isdisjoint(node.input)}


def test_the_result_is_the_engine_that_was_timed_and_tested_with_the_evidence_of_build_trt(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path
) -> None:
    made = search_of(net, images, tmp_path / "tuned", shapes=["x=1x1x12x12:4x1x12x12:32x1x12x12"])
    found, manifest = record(made), made.manifest
    made.verify()
    assert (found.floats, found.codes, found.gpu, found.backend) == ("fp16", "int8", "Simulated GPU", "tensorrt")
    assert [point.name for point in found.points][-1] == "int8"
    point = next(each for each in found.points if each.name == found.result)
    assert point.verdict == "inside"
    assert {name: file.sha256 for name, file in manifest.files.items()} == point.files
    assert (manifest.kind, manifest.precision, manifest.target) == ("engine", "int8", TARGET)
    assert manifest.profiles[0]["x"].max == (32, 1, 12, 12)
    assert manifest.parity is not None
    assert manifest.parity.by.startswith("emulation on onnxruntime")
    assert manifest.engine_parity is not None
    assert manifest.precision_share is not None
    assert manifest.accuracy is not None
    assert manifest.accuracy.backend == "tensorrt"
    assert manifest.parent is not None
    assert made.parent().manifest.digest == net.manifest.digest  # type: ignore[union-attr]
    assert "in INT8" in summary(made)
    assert "fp16 " in text(made)
    assert "Simulated GPU" in render(made)
    with open_session(made, "tensorrt") as session:
        assert list(session.inputs) == net.manifest.inputs
    assert not simulated.held()


def test_what_is_not_in_codes_is_in_fp16(simulated: Simulated, net: Artifact, images: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, Path]] = []
    original = engines.EngineMixes._built

    def kept(self: engines.EngineMixes, name: str, typed: Any) -> Artifact:
        made = original(self, name, typed)
        (tmp_path / f"{len(seen)}.onnx").write_bytes(made.onnx_path.read_bytes())
        seen.append((name, tmp_path / f"{len(seen)}.onnx"))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.EngineMixes, "_built", kept)
        search_of(net, images, tmp_path / "tuned")
    assert [name for name, _ in seen[:3]] == ["fp16", "int8", "even"]
    half, codes = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    kinds = {name: set().union(*types(path).values()) for name, path in reversed(seen)}
    assert codes not in kinds["fp16"]
    assert half in kinds["fp16"]
    assert {half, codes} <= kinds["even"]


def test_where_no_mix_passes_the_result_is_an_engine_in_fp16_with_its_evidence(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tune.certify.verdict_of", lambda found: "outside")
    made = search_of(net, images, tmp_path / "tuned")
    manifest = made.manifest
    assert (record(made).result, manifest.kind, manifest.precision) == ("fp16", "engine", "fp16")
    assert manifest.parity is not None
    assert manifest.engine_parity is not None
    assert (made.path / ENGINE).stat().st_size > (made.path / ONNX).stat().st_size
    assert "fp16 *" in text(made)
    assert "FP16 on tensorrt" in summary(made)
    assert manifest.accuracy is not None
    assert "; FP16 keeps within the limit: top-1" in record(made).because


def test_fp16_that_loses_too_much_is_no_result(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tune.certify.verdict_of", lambda found: "outside")
    monkeypatch.setattr("deploy.tune.tune.verdict_of", lambda found: "outside")
    with pytest.raises(AccuracyError, match=r"no mix is shown .*, and neither does FP16 keep within the limit: top-1"):
        search_of(net, images, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_fp16_without_evidence_is_said_before_the_search(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attested(engine: Artifact, *given: Any, **options: Any) -> Any:
        raise EngineError("the engine computes something else")

    monkeypatch.setattr(engines, "attested", attested)
    monkeypatch.setattr("deploy.tune.tune.weigh", lambda *given: pytest.fail("the search began"))
    with pytest.raises(EngineError, match="the engine computes something else"):
        search_of(net, images, tmp_path / "tuned")


def test_a_mix_for_the_cost_model_that_is_not_built_is_done_without(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    original = engines.EngineMixes.build

    def refusing(self: engines.EngineMixes, name: str, stay: Sequence[str]) -> Artifact:
        if name in ("even", "odd", "first"):
            raise EngineError("no kernel")
        return original(self, name, stay)

    monkeypatch.setattr(engines.EngineMixes, "build", refusing)
    assert search_of(net, images, tmp_path / "tuned").manifest.kind == "engine"
    assert "the cost model has to do without one mix (even): no kernel" in caplog.text


def test_the_damage_of_a_unit_is_that_of_its_codes_and_of_no_others(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CalibratedGraph.placement
    seen: list[set[str]] = []

    def without_body(self: CalibratedGraph, engine: Any = None) -> Any:
        """As if FP16 beside codes kept the second layer in FP32."""
        if not self.options.fp16:
            return original(self, engine)
        stay = replace(self, known=replace(self.known, noisy={"body/Conv": "it overflows in FP16"}))
        return original(stay, engine)

    original_outputs = engines.outputs

    def outputs(artifact: Artifact, *given: Any) -> Any:
        if artifact.path.name.startswith("alone"):
            seen.append(reading_codes(artifact.onnx_path))
        return original_outputs(artifact, *given)

    monkeypatch.setattr(CalibratedGraph, "placement", without_body)
    monkeypatch.setattr(engines, "outputs", outputs)
    made = search_of(net, images, tmp_path / "tuned")
    units = [set(unit.nodes) for unit in record(made).units]
    assert "body/Conv" not in set().union(*units)
    assert sorted(map(sorted, seen)) == sorted(sorted(unit & {"stem/Conv", "head/Gemm"}) for unit in units)


def test_an_engine_that_is_not_what_it_says_is_left_out_for_another(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = engines.attested
    refused: list[Path] = []

    def attested(engine: Artifact, *given: Any, **options: Any) -> Any:
        if not refused and engine.manifest.precision == "int8":
            refused.append(engine.path)
            raise EngineError("50 % of the multiply-accumulates are INT8")
        return original(engine, *given, **options)

    monkeypatch.setattr(engines, "attested", attested)
    made = search_of(net, images, tmp_path / "tuned")
    (left,) = [point for point in record(made).points if point.left_out is not None]
    assert left.left_out == "50 % of the multiply-accumulates are INT8"
    assert (record(made).result, made.manifest.precision) != (left.name, "int8")
    assert made.manifest.engine_parity is not None


def test_fp8_takes_the_place_of_int8(simulated: Simulated, net: Artifact, images: Path, tmp_path: Path) -> None:
    made = search_of(net, images, tmp_path / "tuned", fp8=True, include=())
    found = record(made)
    assert (found.codes, made.manifest.precision, found.result) == ("fp8", "fp8", "fp8")
    assert [unit.nodes for unit in found.units] == [["head/Gemm"]]  # TensorRT has no convolutions in FP8 for these
    assert "in FP8" in text(made)


def test_damage_is_measured_on_rows_that_the_engines_take(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path
) -> None:
    made = search_of(net, images, tmp_path / "tuned", shapes=["x=1x1x12x12:1x1x12x12:1x1x12x12"], batch_size=8)
    assert record(made).rows == 32
    made = search_of(net, images, tmp_path / "five", shapes=["x=5x1x12x12:6x1x12x12:7x1x12x12"], batch_size=2, batch=5)
    assert any(point.verdict for point in record(made).points)  # 64 images: the last 1 fills no engine
    assert record(made).rows == 30
    assert record(made).batch == 5
    with pytest.raises(UsageError, match="the engines take batches of 40 and more: give as many rows to calibrate on"):
        search_of(net, images, tmp_path / "many", shapes=["x=40x1x12x12"], batch=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["x=1x1x12x12:2x1x12x12:4x1x12x12"], "batch": 5}, "an engine of these `shapes` takes no `batch` 5"),
        ({"shapes": ["z=1x1"]}, "`shapes`: unknown input 'z'"),
        ({"backend": "onnxruntime", "fp8": True}, "`shapes` and `fp8` are for engines: name the `backend` tensorrt"),
        ({"backend": "auto", "shapes": ["x=1x1x12x12"]}, "`shapes` and `fp8` are for engines"),
        ({"device": "cuda:1"}, "engines are built and timed on cuda:0, not on cuda:1"),
        ({"device": "cpu"}, "engines are built and timed on cuda:0, not on cpu"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    simulated: Simulated,
    net: Artifact,
    images: Path,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.tune.tune.calibrate_onnx", lambda *given: pytest.fail("the work began"))
    with pytest.raises(UsageError, match=message):
        search_of(net, images, tmp_path / "out", **options)


def test_without_a_gpu_nothing_is_begun(net: Artifact, images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"no NVIDIA GPU here that tensorrt-rtx could run on|needs an NVIDIA GPU|no NVIDIA GPU"
    ):
        search_of(net, images, tmp_path / "out", backend="tensorrt-rtx")


def test_data_that_can_be_read_only_once_is_refused_before_the_work(
    simulated: Simulated, net: Artifact, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tune.tune.calibrate_onnx", lambda *given: pytest.fail("the work began"))
    feeds = ({"x": np.zeros((2, 1, 12, 12), np.float32)} for _ in range(4))
    with pytest.raises(UsageError, match="give what can be read again"):
        search_of(net, images, tmp_path / "tuned", calib=feeds)
