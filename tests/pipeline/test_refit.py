"""New weights for an engine without weights. Only a machine with a GPU builds one: here, another engine is declared to be one."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, Target
from deploy.artifact.tensors import random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.engine.cuda.driver import has_gpu
from deploy.errors import BackendError, EngineError, UsageError
from deploy.pipeline.refit import network_difference


def declared(engine: Artifact, out: Path, **changes: Any) -> Artifact:
    """A copy of `engine` that says it has no weights."""
    target = engine.manifest.target
    assert target is not None
    with ArtifactWriter(out) as writer:
        for name in engine.manifest.files:
            (writer.path / name).write_bytes((engine.path / name).read_bytes())
        changed: Target = msgspec.structs.replace(target, **{"stripped": True, **changes})
        return writer.commit(msgspec.structs.replace(engine.manifest, target=changed, files={}))


@pytest.fixture
def retrained(shared_lenet5: Artifact, tmp_path: Path) -> Path:
    """The same network with other weights."""
    model = onnx.load(shared_lenet5.onnx_path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.25), tensor.name))
    onnx.save(model, tmp_path / "retrained.onnx")
    return tmp_path / "retrained.onnx"


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_new_weights_go_beside_the_plan_as_it_is(
    shared_lenet5: Artifact, retrained: Path, tmp_path: Path, precision: Any
) -> None:
    shapes = ["input=1x1x28x28:2x1x28x28:4x1x28x28"]
    first = deploy.build_trt(shared_lenet5, tmp_path / "built", precision=precision, shapes=shapes, flavour="tensorrt-rtx")
    engine = declared(first, tmp_path / "stripped")
    made = deploy.build_trt(retrained, tmp_path / "new", precision=precision, refit_from=engine.path)
    made.verify()
    assert (made.path / ENGINE).read_bytes() == (engine.path / ENGINE).read_bytes()
    assert made.onnx_path.read_bytes() != engine.onnx_path.read_bytes()
    manifest = made.manifest
    assert (manifest.target, manifest.profiles) == (engine.manifest.target, engine.manifest.profiles)
    assert manifest.source.state_dict != engine.manifest.source.state_dict
    assert (manifest.parity is not None) == (precision is not None)  # of the typed file with the one it was made from
    assert manifest.precision_share is not None
    assert getattr(manifest.precision_share, precision or "fp32") == 1
    rest = deploy.build_trt(retrained, tmp_path / "new", precision=precision, refit_from=engine.path)
    assert rest == made
    assert deploy.build_trt(retrained, tmp_path / "own", precision=precision, shapes=shapes).manifest.target != manifest.target


def test_another_network_gets_no_weights_of_it(shared_lenet5: Artifact, retrained: Path, tmp_path: Path) -> None:
    engine = declared(deploy.build_trt(shared_lenet5, tmp_path / "built", flavour="tensorrt-rtx"), tmp_path / "stripped")
    with pytest.raises(EngineError, match=r"is not the network of .*stripped: node .* build an engine for it"):
        deploy.build_trt(retrained, tmp_path / "out", precision="fp16", refit_from=engine.path)
    calib = [random_feed(shared_lenet5.manifest.inputs, {"batch": 4}, seed=seed) for seed in range(4)]
    int8 = deploy.build_trt(shared_lenet5, tmp_path / "int8", int8=True, calib=calib, flavour="tensorrt-rtx")
    with pytest.raises(EngineError, match="a scale or zero point of quantization, has other values"):
        quantized = declared(int8, tmp_path / "stripped8")
        deploy.build_trt(retrained, tmp_path / "out", int8=True, calib=calib, refit_from=quantized.path)
    assert not (tmp_path / "out").exists()


def test_engines_that_cannot_get_weights_are_refused(shared_lenet5: Artifact, tmp_path: Path) -> None:
    source = shared_lenet5
    whole = deploy.build_trt(source, tmp_path / "built", flavour="tensorrt-rtx")
    for wrong in (whole, source):
        with pytest.raises(UsageError, match="is no engine without weights: build one with `strip`"):
            deploy.build_trt(source, tmp_path / "out", refit_from=wrong.path)
    old = declared(whole, tmp_path / "old", version="1.2.0")
    with pytest.raises(BackendError, match=r"was built with tensorrt-rtx 1\.2\.0, and 1\.\S+ is installed"):
        deploy.build_trt(source, tmp_path / "out", refit_from=old.path)
    others: list[dict[str, Any]] = [{"shapes": ["input=1x1x28x28"]}, {"flavour": "tensorrt-rtx"}, {"tf32": True}, {"strip": True}]
    for options in others:
        with pytest.raises(UsageError, match="`refit_from` takes the engine as it was built"):
            deploy.build_trt(source, tmp_path / "out", refit_from=old.path, **options)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_what_cannot_be_built_here_is_refused_before_the_calibration(
    shared_lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.pipeline.typed.quantize_onnx", lambda *_: pytest.fail("the calibration began"))
    calib = [random_feed(shared_lenet5.manifest.inputs, {"batch": 4})]
    with pytest.raises(BackendError, match="`strip`: tensorrt-rtx leaves weights out only on a machine with a GPU"):
        deploy.build_trt(shared_lenet5, tmp_path / "out", int8=True, calib=calib, flavour="tensorrt-rtx", strip=True)


def test_a_network_differs_by_all_but_its_weights(tmp_path: Path) -> None:
    """Reshape's shape is a table of integers, and Scale's weight is no scale of quantization."""

    def save(name: str, weight: float = 1.0, size: int = 3, operator: str = "Relu", rank: int = 4) -> Path:
        nodes = [
            onnx.helper.make_node("Mul", ["x", "w"], ["a"], name="scaled", doc_string=name),
            onnx.helper.make_node("Reshape", ["a", "s"], ["b"], name="shaped"),
            onnx.helper.make_node(operator, ["b"], ["y"], name="last"),
        ]
        ends = [onnx.helper.make_tensor_value_info("x", 1, ["n", rank]), onnx.helper.make_tensor_value_info("y", 1, None)]
        weights = [
            onnx.numpy_helper.from_array(np.full((rank,), weight, np.float32), "w"),
            onnx.numpy_helper.from_array(np.array([-1, size]), "s"),
        ]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)), tmp_path / name)
        return tmp_path / name

    first = save("first.onnx")
    assert network_difference(save("weights.onnx", weight=2), first) is None
    for options, difference in (
        ({"operator": "Neg"}, "node 'last' (Neg) is not the same in both"),
        ({"size": 2}, "'s', a constant that is no weight, has other values"),
        ({"rank": 8}, "its inputs are others"),
    ):
        assert network_difference(save("other.onnx", **options), first) == difference  # type: ignore[arg-type]
