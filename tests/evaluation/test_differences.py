from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Detections
from deploy.artifact.manifest import ONNX
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import UsageError
from deploy.evaluation.differences import KEPT, Differences, unmatched
from deploy.evaluation.evaluate import evaluate


def found(boxes, labels=None, scores=None) -> Detections:
    labels = [0] * len(boxes) if labels is None else labels
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores or [0.9] * len(boxes)), np.array(labels, int))


def test_boxes_have_a_partner_where_one_of_their_class_overlaps_by_half():
    one = found([[0, 0, 10, 10], [20, 20, 30, 30]])
    assert unmatched(one, found([[1, 0, 11, 10], [20, 20, 30, 30]])) == 0
    assert unmatched(one, found([[6, 0, 16, 10]])) == 2
    assert unmatched(one, found([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 1])) == 1
    assert unmatched(found([[0, 0, 10, 10], [0, 0, 10, 9]]), found([[0, 0, 10, 10]])) == 1
    assert unmatched(one, found([])) == 2


def swapped(model: Artifact, out: Path) -> Artifact:
    """The same net with its first two classes taken for one another."""
    graph = onnx.load(model.onnx_path)
    for tensor in graph.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if array.shape[-1] == 7:
            array[..., [0, 1]] = array[..., [1, 0]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    with ArtifactWriter(out) as writer:
        onnx.save(graph, writer.path / ONNX)
        return writer.commit(msgspec.structs.replace(model.manifest, files={}))


def test_two_classifiers_are_compared_input_by_input(model, tmp_path, make_folder):
    folder = make_folder(tmp_path / "data", ant=[0, 0, 0], bee=[1], cat=[2, 3], dog=[3])
    result = evaluate(model, folder, against=swapped(model, tmp_path / "other"))
    against = result.against
    assert (against.value, len(against.differing)) == (pytest.approx(100 * 2 / 7), 4)
    assert against.loss == pytest.approx(against.value - result.value)
    assert against.loss_low < against.loss < against.loss_high
    answers = [(each.right, each.answer.split()[0], each.other.split()[0]) for each in against.differing]
    assert sorted(answers) == [("ant", "ant", "bee")] * 3 + [("bee", "bee", "ant")]
    document = result.to_json()["against"]
    assert (document["differing"], len(document["inputs"])) == (4, 4)
    assert set(document["inputs"][0]) == {"path", "amount", "answer", "other", "right"}


def test_artifacts_of_other_classes_or_preprocessing_are_not_compared(model, tmp_path, make_model, make_folder):
    folder = make_folder(tmp_path / "data", ant=[0], bee=[1])
    for options, message in (
        ({"names": ["bee", "ant", "cat", "dog", "emu", "fox", "gnu"]}, "have different class names"),
        ({"preprocess": Preprocess(channels=1, crop=8, mean=(0.5,))}, "preprocess images in different ways"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, folder, against=make_model(tmp_path / "other", **options))


def test_two_segmenters_differ_by_pixels_and_two_detectors_by_boxes(make_segmenter, make_detector, scenes, boxes, tmp_path):
    one, other = make_segmenter(tmp_path / "one"), make_segmenter(tmp_path / "other", noise=0.6)
    against = evaluate(one, scenes, metric="miou", against=other).against
    amounts = [each.amount for each in against.differing]
    assert amounts == sorted(amounts, reverse=True)
    assert len(amounts) == 6
    assert next(iter(against.differing)).answer == f"{amounts[0]:.2%} of the pixels differ"
    assert len(evaluate(one, scenes, metric="miou", against=one).against.differing) == 0
    names = ["grey", "bright"]
    first, second = make_detector(tmp_path / "first", names=names), make_detector(tmp_path / "second", names=names, shift=30)
    against = evaluate(first, boxes, metric="map", against=second).against
    each = next(iter(against.differing))
    assert each.amount >= 1
    assert "bright" in each.answer
    assert "bright" not in each.other


def test_the_answers_of_the_most_different_inputs_alone_are_kept():
    differences = Differences(None)
    for index in range(KEPT + 10):
        one, other = np.zeros((10, 10), int), np.zeros((10, 10), int)
        other.flat[: index + 1] = 1
        differences.add([f"{index}.png"], [one], [other], None)
    kept = [each.drawn is not None for each in differences]
    assert kept == [True] * KEPT + [False] * 10
