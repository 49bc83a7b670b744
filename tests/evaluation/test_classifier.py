import numpy as np
import pytest

from deploy.artifact.preprocess import Preprocess
from deploy.errors import UsageError
from deploy.evaluation.classifier import softmax
from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.predict import predict

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]


@pytest.mark.parametrize("count", [None, "classes"], ids=["static", "symbolic"])
def test_names_must_be_as_many_as_the_classes(tmp_path, count, make_model, make_folder):
    wrong = make_model(tmp_path / "wrong", names=NAMES[:3], count=count)
    folder = make_folder(tmp_path / "data", ant=[0])
    for call in (lambda: evaluate(wrong, folder), lambda: predict(wrong, [folder])):
        with pytest.raises(UsageError, match="wrong has 7 classes and 3 class names"):
            call()


def test_a_model_without_preprocessing_is_refused(tmp_path, make_model, make_folder):
    bare = make_model(tmp_path / "bare", preprocess=None)
    with pytest.raises(UsageError, match="export it with --preprocess"):
        evaluate(bare, make_folder(tmp_path / "data", ant=[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ("logits", "more")}, "gives logits: float32 batchx7, more: float32 batchx7; expected one output"),
        ({"preprocess": Preprocess(crop=8)}, "makes 3x8x8 of .*; the model takes input: float32 batchx1x8x8"),
        ({"preprocess": Preprocess(channels=1, crop=9)}, "makes 1x9x9 of"),
    ],
    ids=["outputs", "channels", "size"],
)
def test_a_model_that_is_no_classifier_of_such_images_is_refused(tmp_path, options, message, make_model, make_folder):
    with pytest.raises(UsageError, match=message):
        evaluate(make_model(tmp_path / "model", **options), make_folder(tmp_path / "data", ant=[0]))


def test_softmax_is_stable_and_sums_to_one():
    found = softmax(np.array([[1000, 999], [-1000, -1000]], dtype=np.float32))
    np.testing.assert_allclose(found, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)], [0.5, 0.5]])
    np.testing.assert_allclose(softmax(np.float16([[60000, -60000]])), [[1, 0]])


def test_null_warns_that_its_classes_mean_nothing(model, tmp_path, caplog, make_folder):
    folder = make_folder(tmp_path / "images", ant=[0], bee=[1])
    evaluate(model, folder)
    predict(model, folder)
    assert caplog.text == ""
    evaluate(model, folder, backend="null")
    predict(model, folder, backend="null")
    assert caplog.text.count("null computes nothing: all logits are 0") == 2
