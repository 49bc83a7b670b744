"""Optimization profiles, asked for with --shapes."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Profile, ShapeRange, TensorSpec
from deploy.errors import UsageError
from deploy.pipeline.profiles import make_profiles, parse_range


def test_shapes_make_the_profile_of_a_dynamic_input(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        means (float[batch, 3, H, W] input) => (float[batch, 2, 1, 1] y) <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}> {
            features = Conv(input, w)
            y = GlobalAveragePool(features)
        }
    """
    dynamic = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), dynamic)
    with pytest.raises(UsageError, match="dynamic in batch, H, W: say `shapes` input=MIN:OPT:MAX"):
        deploy.build_trt(dynamic, tmp_path / "engine")
    shapes = "input=1x3x32x32:2x3x64x64:4x3x96x96"
    engine = deploy.build_trt(dynamic, tmp_path / "engine", precision="fp16", shapes=[shapes])
    assert str(engine.manifest.profiles[0]["input"]) == shapes.partition("=")[2]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("input=1x1x28x28:2x1x28x28", "expected NAME=MIN:OPT:MAX"),
        ("inptu=1x1x28x28", "unknown input 'inptu'"),
        ("input=4x1x28x28:2x1x28x28:8x1x28x28", "MIN <= OPT <= MAX"),
        ("input=1x3x28x28", "dimension 1 is fixed to 1"),
        ("input=nx1x28x28", "must be numbers"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(lenet5: Artifact, tmp_path: Path, shapes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deploy.build_trt(lenet5, tmp_path / "engine", shapes=[shapes])


@pytest.fixture
def rangeseg(reference: Callable[[str], Artifact]) -> Artifact:
    """Two inputs that share their batch."""
    return reference("rangeseg")


def test_shapes_of_one_input_give_the_batch_of_the_other(rangeseg: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(rangeseg, tmp_path / "engine", shapes=["intensity=1x1x64x256:2x1x64x256:4x1x64x256"])
    (profile,) = engine.manifest.profiles
    assert str(profile["distance"]) == str(profile["intensity"]) == "1x1x64x256:2x1x64x256:4x1x64x256"


def test_shapes_that_contradict_one_another_are_refused_by_the_names_of_both(rangeseg: Artifact, tmp_path: Path) -> None:
    shapes = ["distance=1x1x64x256", "intensity=1x1x64x256:2x1x64x256:4x1x64x256"]
    with pytest.raises(UsageError, match=r"'batch' as 1:1:1 in 'distance' and 1:2:4 in 'intensity'"):
        deploy.build_trt(rangeseg, tmp_path / "engine", shapes=shapes)
    with pytest.raises(UsageError, match="dimension 1 is fixed to 1"):
        deploy.build_trt(rangeseg, tmp_path / "engine", shapes=["distance=2x2x64x256"])
    assert not (tmp_path / "engine").exists()


def test_one_shape_stands_for_all_three() -> None:
    assert parse_range("x=2x3") == ("x", ShapeRange(min=(2, 3), opt=(2, 3), max=(2, 3)))


def test_an_input_that_is_named_again_begins_the_next_profile() -> None:
    inputs = [
        TensorSpec(name="x", dtype="float32", shape=("batch", 8)),
        TensorSpec(name="y", dtype="float32", shape=("batch", "n")),
    ]
    known: list[Profile] = [
        {
            "x": ShapeRange(min=(1, 8), opt=(8, 8), max=(32, 8)),
            "y": ShapeRange(min=(1, 4), opt=(8, 5), max=(32, 6)),
        }
    ]
    found = make_profiles(["x=1x8:2x8:4x8", "y=1x3:2x3:4x3", "x=64x8"], inputs, known)
    assert [{name: str(shapes) for name, shapes in profile.items()} for profile in found] == [
        {"x": "1x8:2x8:4x8", "y": "1x3:2x3:4x3"},
        {"x": "64x8:64x8:64x8", "y": "64x4:64x5:64x6"},
    ]
    assert make_profiles([], inputs, known) == known


def test_an_engine_has_every_profile_that_was_asked_for(lenet5: Artifact, tmp_path: Path) -> None:
    shapes = ["input=1x1x28x28:1x1x28x28:4x1x28x28", "input=8x1x28x28:32x1x28x28:64x1x28x28"]
    engine = deploy.build_trt(lenet5, tmp_path / "engine", shapes=shapes)
    assert [f"input={profile['input']}" for profile in engine.manifest.profiles] == shapes
