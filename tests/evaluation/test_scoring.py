import dataclasses
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import DataError, UsageError
from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.options import MetricOptions


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("miuo", r"unknown `metric` 'miuo'; expected one of top1, .*did you mean 'miou'\?"),
        ("lower:miou", "of miou more is better"),
        ("own.py", "unknown `metric` 'own.py'"),
    ],
)
def test_a_metric_that_there_is_not_is_refused(metric, message):
    with pytest.raises(UsageError, match=message):
        MetricOptions(metric=metric)


def test_an_index_to_ignore_is_of_masks():
    with pytest.raises(UsageError, match="`ignore_index` is of masks, which map does not read"):
        MetricOptions(metric="map", ignore_index=0)
    assert MetricOptions(metric="own.py:Dice", ignore_index=0).ignore_index == 0


def test_data_that_is_for_another_metric_is_refused_and_the_right_one_described(
    model, make_segmenter, make_detector, scenes, boxes, tmp_path, make_folder
):
    folder = make_folder(tmp_path / "data", ant=[0])
    segmenter, detector = make_segmenter(tmp_path / "seg"), make_detector(tmp_path / "det")
    for artifact, data, metric, message in (
        (model, scenes, "top1", "holds a folder with images/ and masks/; the metric takes an ImageFolder"),
        (segmenter, folder, "miou", "holds an ImageFolder.*the metric takes a folder with images/ and masks/"),
        (
            segmenter,
            boxes,
            "miou",
            r"boxes\.json holds a COCO JSON; the metric takes a folder with images/ .*`metric` map takes what",
        ),
        (segmenter, scenes / "images", "miou", r"scenes/images holds no labels; the metric takes a folder with images/"),
        (segmenter, boxes.parent / "none.json", "miou", r"no file at .*none\.json"),
        (detector, scenes, "map", "holds a folder with images/ and masks/; the metric takes a COCO JSON"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(artifact, data, metric=metric)


def test_outputs_that_a_metric_cannot_read_are_refused_before_the_data_is(model, make_segmenter, tmp_path):
    segmenter = make_segmenter(tmp_path / "seg")
    with pytest.raises(UsageError, match=r"expected logits batch x classes .2 or more. x height x width, or integers"):
        evaluate(model, tmp_path / "none", metric="miou")
    with pytest.raises(UsageError, match="does not say how its outputs become boxes: export it with --decode"):
        evaluate(model, tmp_path / "none", metric="map")
    with pytest.raises(
        UsageError, match="expected one output of shape batch x classes; top1 is of classifiers: segmenters have `metric` miou"
    ):
        evaluate(segmenter, tmp_path / "none")


def test_masks_are_checked_before_anything_is_run(make_segmenter, scenes, tmp_path):
    from PIL import Image

    artifact = make_segmenter(tmp_path / "net")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(scenes / "masks/5.png")
    told = []
    with pytest.raises(DataError, match=r"masks/5\.png has the value 7; expected the indices of 3 classes, 0 to 2, and 255"):
        evaluate(artifact, scenes, metric="miou", progress=lambda *call: told.append(call))
    assert told == []
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(scenes / "masks/5.png")
    with pytest.raises(DataError, match=r"masks/5\.png has 8x8 pixels, and .*images/5\.png 16x16"):
        evaluate(artifact, scenes, metric="miou")


def test_masks_in_npz_files_are_measured_and_checked_too(make_segmenter, scenes, tmp_path):
    from PIL import Image

    artifact = make_segmenter(tmp_path / "net")
    (tmp_path / "feeds").mkdir()
    for path in sorted((scenes / "images").iterdir()):
        pixels = np.asarray(Image.open(path), np.float32)[None, None] / 255
        np.savez(
            tmp_path / "feeds" / f"{path.stem}.npz", input=pixels, label=np.asarray(Image.open(scenes / "masks" / path.name))
        )
    assert evaluate(artifact, tmp_path / "feeds", metric="miou").value == evaluate(artifact, scenes, metric="miou").value
    last, pixels, told = tmp_path / "feeds/5.npz", np.zeros((1, 1, 16, 16), np.float32), []
    for label, message in (
        ({"label": np.full((1, 16, 16), 9)}, r"5\.npz has the value 9 in its mask; expected 0 to 2, and 255"),
        ({"label": np.zeros((1, 16, 16))}, r"5\.npz: 'label' is float64 \(1, 16, 16\); expected 1 masks of class indices"),
        ({"label": np.zeros((1, 4, 4), int)}, r"5\.npz has masks of 4x4; the model takes and gives 16x16"),
        ({}, r"5\.npz has no array 'label' with the target of each row"),
    ):
        np.savez(last, input=pixels, **label)
        with pytest.raises(DataError, match=message):
            evaluate(artifact, tmp_path / "feeds", metric="miou", progress=lambda *call: told.append(call))
        assert told == [], "it is said before anything is run"


def test_masks_are_cropped_as_their_images_and_padding_counts_for_nothing(make_segmenter, scenes, tmp_path):
    whole = make_segmenter(tmp_path / "whole")
    preprocess = dataclasses.replace(whole.manifest.preprocess, crop=24)  # more than the 16 pixels of an image
    padded = Artifact(whole.path, msgspec.structs.replace(whole.manifest, preprocess=preprocess))
    assert evaluate(padded, scenes, metric="miou").value == evaluate(whole, scenes, metric="miou").value


def test_without_pycocotools_the_extra_is_named(make_detector, boxes, tmp_path):
    artifact = make_detector(tmp_path / "net", names=["grey", "bright"])
    code = (
        "import sys; sys.modules['pycocotools'] = None; import deploy\n"
        f"try: deploy.evaluate({str(artifact.path)!r}, {str(boxes)!r}, metric='map')\n"
        "except deploy.DeployError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "`metric` map needs pycocotools, which is not installed: pip install 'deploy[metrics]'\n"
