"""Inputs, outputs, preprocessing and class names are checked against one another before an export."""

import dataclasses
import json
from pathlib import Path

import pytest
from torch import nn

from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.errors import UsageError
from deploy.intake.build import BuiltModel
from deploy.pipeline.export_interface import (
    check_classes,
    default_preprocess,
    image_fields,
    input_specs,
    load_preprocess,
    load_preprocesses,
    output_names,
    parse_input,
    read_classes,
)


def test_inputs_and_classes_are_parsed(tmp_path: Path) -> None:
    assert parse_input("ids=1xN:int64") == TensorSpec(name="ids", dtype="int64", shape=(1, "N"))
    assert parse_input("x=1x3").dtype == "float32"
    assert parse_input("x:0=1x3") == TensorSpec(name="x:0", dtype="float32", shape=(1, 3))
    assert parse_input("x:0=1x3:int8") == TensorSpec(name="x:0", dtype="int8", shape=(1, 3))
    for bad in ("x", "x=", "=1x3", "x=1x3:float99", "x=1x3:", "x=:int8", "x=1x3:1x3", "x:int8"):
        with pytest.raises(UsageError, match="cannot read the input"):
            parse_input(bad)
    path = tmp_path / "classes.txt"
    path.write_text("a\nb c\n\n")
    assert read_classes(path) == ["a", "b c"]
    for content, message in (("", "one class name a line"), ("a\n\nb", "no empty line"), ("a\na\n", "'a' twice")):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_classes(path)


def image(*shape: int | str) -> TensorSpec:
    return TensorSpec(name="image", dtype="float32", shape=shape)


def built_of(preprocess: Preprocess | None) -> BuiltModel:
    return BuiltModel(
        module=nn.Identity(), factory="timm:x", args={}, source_files=(), folder=None, inputs=None, outputs=None,
        preprocess=preprocess, num_classes=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("preprocess", "shape", "message"),
    [
        (
            {"crop": 224},
            ("batch", 3, 256, 256),
            "it makes 3x224x224 (chw) of an image, and the model takes image: float32 batchx3x256x256",
        ),
        ({"crop": [64, 48]}, ("batch", 3, 48, 64), "it makes 3x64x48 (chw)"),
        ({"resize": [64, 48]}, ("batch", 3, "H", 64), "it makes 3x64x48 (chw)"),
        ({"channels": 1, "crop": 8}, ("batch", 3, 8, 8), "it makes 1x8x8 (chw)"),
        ({"channels": 1}, ("batch", 3, "H", "W"), "it makes 1xheightxwidth (chw)"),
        ({"crop": 8}, ("batch", 8, 8, 3), "it makes 3x8x8 (chw)"),
        ({"crop": 8, "layout": "hwc"}, ("batch", 3, 8, 8), "it makes 8x8x3 (hwc)"),
        ({"resize": 256}, ("batch", 3, 224, 224), "it makes images of 256 pixels or more a side"),
    ],
)
def test_preprocessing_that_makes_another_array_than_the_input_is_refused(
    preprocess: dict[str, object], shape: tuple[int | str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(preprocess))
    with pytest.raises(UsageError) as caught:
        load_preprocess(str(path), [image(*shape)])
    assert str(caught.value).startswith(f"`preprocess` {path} does not fit the input: {message}")


@pytest.mark.parametrize(
    ("preprocess", "shape"),
    [
        ({"crop": 224}, ("batch", 3, 224, 224)),
        ({"crop": 224}, ("batch", 3, "H", "W")),
        ({"crop": 8, "layout": "hwc"}, ("batch", 8, 8, 3)),
        ({"resize": 28}, ("batch", 3, 28, 28)),
        ({"resize": 28}, ("batch", 3, 28, 40)),
        ({}, ("batch", 3, 224, 224)),
    ],
)
def test_preprocessing_that_may_fit_is_taken(preprocess: dict[str, object], shape: tuple[int | str, ...], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(preprocess))
    assert load_preprocess(str(path), [image(*shape)]) == Preprocess.from_json(preprocess)


def test_a_preset_follows_the_input_and_is_refused_where_the_channels_differ() -> None:
    loaded = load_preprocess("imagenet", [image("batch", 3, 64, 64)])
    assert loaded is not None
    assert loaded.crop == 64
    with pytest.raises(UsageError, match="`preprocess` imagenet does not fit the input: it makes 3x64x64"):
        load_preprocess("imagenet", [image("batch", 1, 64, 64)])


def test_of_several_inputs_those_that_images_become_are_named_or_the_only_one_that_can_be() -> None:
    left, right = image("batch", 3, 8, 8), dataclasses.replace(image("batch", 1, 4, 4), name="right")
    vector = TensorSpec(name="v", dtype="float32", shape=("batch", 3))
    assert load_preprocesses(None, [left, vector]) == {}
    assert load_preprocesses("none", [vector, left]) == {"image": load_preprocess("none", [left])}
    found = load_preprocesses("right=mnist,image=none", [left, vector, right])
    assert list(found) == ["right", "image"]
    assert found["right"].crop == 4
    assert image_fields(found, [left, vector, right]) == {
        "preprocess": found["right"], "image": "right", "other_images": {"image": found["image"]},
    }  # fmt: skip
    assert image_fields(load_preprocesses("none", [left]), [left])["image"] is None
    assert image_fields({}, [left, vector])["preprocess"] is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", "`preprocess` must say which input it is for, such as image=imagenet,right=imagenet"),
        ("image=none,image=none", "names an input twice"),
        ("image=none,v=none", "is for models with one image input; this one takes v"),
        ("image=nothing", "unknown preprocess 'nothing'"),
        ("image=mnist", "`preprocess` mnist does not fit the input"),
    ],
)
def test_preprocessing_of_an_input_that_cannot_be_meant_is_refused(spec: str, message: str) -> None:
    left, right = image("batch", 3, 8, 8), dataclasses.replace(image("batch", 3, 4, 4), name="right")
    with pytest.raises(UsageError, match=message):
        load_preprocesses(spec, [left, right, TensorSpec(name="v", dtype="float32", shape=("batch", 3))])


def test_preprocessing_of_the_architecture_is_left_out_with_a_warning_where_another_input_was_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = built_of(Preprocess(resize=256, crop=224))
    assert default_preprocess(built, [image("batch", 3, 224, 224)]) == built.preprocess
    assert caplog.text == ""
    assert default_preprocess(built, [image("batch", 3, 64, 64)]) is None
    assert "the preprocessing of timm:x is left out: it makes 3x224x224" in caplog.text
    preset = dataclasses.replace(built, preprocess="imagenet")
    found = default_preprocess(preset, [image("batch", 3, 64, 64)])
    assert found is not None
    assert found.crop == 64


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "float64", "bfloat16", "bool"])
def test_preprocessing_is_refused_for_an_input_that_no_image_is_fed_to(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = dataclasses.replace(image("batch", 3, 8, 8), dtype=dtype)
    with pytest.raises(UsageError, match=f"makes float32 of an image, and the model takes image: {dtype} "):
        load_preprocess("none", [spec])
    built = built_of(Preprocess(crop=8))
    assert default_preprocess(built, [spec]) is None
    assert f"takes image: {dtype}" in caplog.text
    assert load_preprocess("none", [dataclasses.replace(spec, dtype="float16")]) is not None


def test_a_leading_one_stays_where_the_batch_is_another_dimension() -> None:
    texts = ["x=1xTx6", "h=1xbatchx8", "c=2xbatchx8"]
    shapes = [spec.shape for spec in input_specs(texts, built_of(None), static_batch=False)]
    assert shapes == [("batch", "T", 6), (1, "batch", 8), (2, "batch", 8)]
    beside = input_specs(["x=TxNx6", "h=1xNx8", "c=1x3"], built_of(None), static_batch=False)
    assert [spec.shape for spec in beside] == [("T", "N", 6), (1, "N", 8), ("batch", 3)]
    points = input_specs(["x=1xNx3"], built_of(None), static_batch=False)
    assert [spec.shape for spec in points] == [("batch", "N", 3)]


def test_an_output_that_the_module_calls_as_an_input_needs_another_name() -> None:
    specs, built = [image("batch", 3)], built_of(None)
    with pytest.raises(UsageError, match=r"'image' is given to two inputs or outputs; timm:x names it so: .*`outputs`"):
        output_names([], built, specs, ["image", "y"])
    assert output_names(["a", "b"], built, specs, ["image", "y"]) == ["a", "b"]


def test_class_names_must_be_as_many_as_the_scores() -> None:
    check_classes(["a", "b"], [("batch", 2)])
    check_classes(None, [("batch", 2)])
    check_classes(["a", "b"], [("batch", 3, 8, 8)])  # one name a score is for classifiers alone
    with pytest.raises(UsageError, match="`classes` has 2 names, and the model gives 3 scores"):
        check_classes(["a", "b"], [("batch", 3)])
