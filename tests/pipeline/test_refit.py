"""New weights for an engine without weights. Only a machine with a GPU builds one: here, another engine is declared to be one."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, Target
from deploy.artifact.tensors import random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import BackendError, EngineError, UsageError
from deploy.models.registry import ARCHITECTURES
from deploy.pipeline.refit import network_difference


def declared(engine: Artifact, out: Path, **changes: object) -> Artifact:
    """A copy of `engine` that says it has no weights."""
    target = engine.manifest.target
    assert target is not None
    with ArtifactWriter(out) as writer:
        for name in engine.manifest.files:
            (writer.path / name).write_bytes((engine.path / name).read_bytes())
        changed: Target = msgspec.structs.replace(target, **{"stripped": True, **changes})  # type: ignore[arg-type]
        return writer.commit(msgspec.structs.replace(engine.manifest, target=changed, files={}))


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[int], Artifact]:
    """lenet5 with the weights of a seed."""

    def make(seed: int) -> Artifact:
        torch.manual_seed(seed)
        torch.save(ARCHITECTURES["lenet5"].create().state_dict(), tmp_path / f"{seed}.pth")
        return deploy.export(tmp_path / f"net{seed}", arch="lenet5", weights=tmp_path / f"{seed}.pth")

    return make


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_new_weights_go_beside_the_plan_as_it_is(
    trained: Callable[[int], Artifact], tmp_path: Path, precision: str | None
) -> None:
    shapes = ["input=1x1x28x28:2x1x28x28:4x1x28x28"]
    first = deploy.build_trt(trained(1), tmp_path / "built", precision=precision, shapes=shapes, flavour="tensorrt-rtx")  # type: ignore[arg-type]
    engine = declared(first, tmp_path / "stripped")
    new = trained(2)
    made = deploy.build_trt(new, tmp_path / "new", precision=precision, refit_from=engine.path)  # type: ignore[arg-type]
    made.verify()
    assert (made.path / ENGINE).read_bytes() == (engine.path / ENGINE).read_bytes()
    assert made.onnx_path.read_bytes() != engine.onnx_path.read_bytes()
    manifest = made.manifest
    assert (manifest.target, manifest.profiles) == (engine.manifest.target, engine.manifest.profiles)
    assert manifest.source.state_dict == new.manifest.source.state_dict != engine.manifest.source.state_dict
    assert manifest.parity is not None
    assert manifest.parity.against == (new.manifest.digest if precision else "eager")
    assert manifest.precision_share is not None
    assert getattr(manifest.precision_share, precision or "fp32") == 1


def test_another_network_gets_no_weights_of_it(trained: Callable[[int], Artifact], tmp_path: Path) -> None:
    source = trained(1)
    engine = declared(deploy.build_trt(source, tmp_path / "built", flavour="tensorrt-rtx"), tmp_path / "stripped")
    for make, reason in (
        (lambda: deploy.build_trt(source, tmp_path / "out", precision="fp16", refit_from=engine.path), "node"),
        (lambda: deploy.build_trt(deploy.export(tmp_path / "mlp", arch="mlp"), tmp_path / "out", refit_from=engine.path), "node"),
    ):
        with pytest.raises(EngineError, match=rf"is not the network of .*stripped: {reason} .* build an engine for it"):
            make()
    feeds = [random_feed(source.manifest.inputs, {"batch": 4}, seed=seed) for seed in range(4)]
    int8 = deploy.build_trt(source, tmp_path / "int8", int8=True, calib=feeds, flavour="tensorrt-rtx")
    with pytest.raises(EngineError, match="a scale or zero point of quantization, has other values"):
        quantized = declared(int8, tmp_path / "stripped8")
        deploy.build_trt(trained(2), tmp_path / "out", int8=True, calib=feeds, refit_from=quantized.path)
    assert not (tmp_path / "out").exists()


def test_engines_that_cannot_get_weights_are_refused(trained: Callable[[int], Artifact], tmp_path: Path) -> None:
    source = trained(1)
    whole = deploy.build_trt(source, tmp_path / "built", flavour="tensorrt-rtx")
    for wrong in (whole, source):
        with pytest.raises(UsageError, match="is no engine without weights: build one with `strip`"):
            deploy.build_trt(source, tmp_path / "out", refit_from=wrong.path)
    old = declared(whole, tmp_path / "old", version="1.2.0")
    with pytest.raises(BackendError, match=r"was built with tensorrt-rtx 1\.2\.0, and 1\.\S+ is installed"):
        deploy.build_trt(source, tmp_path / "out", refit_from=old.path)
    for options in ({"shapes": ["input=1x1x28x28"]}, {"flavour": "tensorrt-rtx"}, {"tf32": True}, {"strip": True}):
        with pytest.raises(UsageError, match="`refit_from` takes the engine as it was built"):
            deploy.build_trt(source, tmp_path / "out", refit_from=old.path, **options)  # type: ignore[arg-type]


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
