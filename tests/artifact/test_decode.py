import numpy as np
import pytest

from deploy.artifact.decode import MOST, Decode, suppressed
from deploy.artifact.tensors import TensorSpec
from deploy.artifact.usercode import UserFunction
from deploy.errors import UsageError, UserCodeError


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *shape))


def test_yolo_reads_centres_and_scores_in_either_order_of_axes():
    row = np.array([[50, 40, 20, 10, 0.1, 0.9], [10, 10, 4, 4, 0.8, 0.0], [0, 0, 1, 1, 0, 0]], np.float32)
    columns = row.T[None]
    decode = Decode(format="yolo")
    (found,) = decode({"out": columns}, [spec("out", 6, 8400)], 2, None)
    np.testing.assert_allclose(found.boxes, [[40, 35, 60, 45], [8, 8, 12, 12], [40, 35, 60, 45]])
    assert found.labels.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.1], rtol=1e-6)
    old = np.concatenate([row[:, :4], [[0.5], [1.0], [0.0]], row[:, 4:]], axis=1)[None].astype(np.float32)
    (found,) = decode({"out": old}, [spec("out", 25200, 7)], 2, None)
    np.testing.assert_allclose(found.scores, [0.8, 0.45, 0.05], rtol=1e-6)


def test_yolo_takes_what_is_suppressed_already_as_it_is():
    rows = np.array([[[1, 2, 30, 40, 0.5, 3], [1, 2, 30, 41, 0.9, 3], [0, 0, 0, 0, 0, 0]]], np.float32)
    (found,) = Decode(format="yolo")({"out": rows}, [spec("out", 300, 6)], 80, None)
    assert found.boxes.tolist() == [[1, 2, 30, 41], [1, 2, 30, 40]]
    assert found.labels.tolist() == [3, 3]


def test_ssd_reads_logits_and_probabilities_alike_with_the_background_first():
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 30, 30]]], np.float32)
    logits = np.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]], np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    outputs = [spec("scores", "A", 3), spec("boxes", "A", 4)]
    found = [
        Decode(format="ssd")({"boxes": boxes, "scores": scores}, outputs, 2, None)[0]
        for scores in (logits, shares.astype(np.float32))
    ]
    for each in found:
        assert each.labels.tolist() == [0, 1, 0, 1]
        np.testing.assert_allclose(each.scores, [shares[0, 0, 1], shares[0, 0, 2], *shares[0, 1, 1:]], rtol=1e-5)
        assert each.boxes[0].tolist() == [0, 0, 10, 10]


def test_of_boxes_of_one_class_that_overlap_the_likeliest_stays_and_other_classes_stay_too():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 5, 10, 15], [50, 50, 60, 60]], np.float32)  # overlaps of 0.9 and 1/3
    scores = np.array([[0.8, 0.0], [0.9, 0.0], [0.7, 0.6], [0.0, 0.5]], np.float32)
    found = suppressed(boxes, scores, 0.5)
    assert list(zip(found.boxes[:, 3].tolist(), found.labels.tolist(), strict=True)) == [(9, 0), (15, 0), (15, 1), (60, 1)]
    found = suppressed(boxes, scores, 0.2)
    assert list(zip(found.boxes[:, 3].tolist(), found.labels.tolist(), strict=True)) == [(9, 0), (15, 1), (60, 1)]


def test_no_more_boxes_are_kept_than_the_metric_looks_at():
    corners = np.arange(300, dtype=np.float32)[:, None] * 20
    boxes = np.concatenate([corners, corners, corners + 10, corners + 10], axis=1)
    found = suppressed(boxes, np.linspace(0.1, 0.9, 300, dtype=np.float32)[:, None], 0.5)
    assert len(found.scores) == MOST
    assert found.scores[0] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("form", "outputs", "classes"),
    [
        ("yolo", [spec("out", 10)], None),
        ("yolo", [spec("out", 84, 8400)], 3),
        ("yolo", [spec("out", 300, 6)], None),
        ("yolo", [spec("a", 84, 8400), spec("b", 84, 8400)], 80),
        ("ssd", [spec("boxes", 100, 4)], None),
        ("ssd", [spec("boxes", 100, 4), spec("scores", 100, 4)], 4),
        ("ssd", [spec("boxes", 100, 5), spec("scores", 100, 3)], 2),
    ],
)
def test_outputs_that_are_of_another_form_are_refused(form, outputs, classes):
    with pytest.raises(UsageError, match=f"decode {form} reads "):
        Decode(format=form).check(outputs, classes)


def own(tmp_path, body: str) -> tuple[Decode, object]:
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef decode(outputs):\n    {body}\n")
    return Decode.load(f"{tmp_path}/mine.py:decode"), tmp_path


def test_a_function_of_the_users_gets_the_outputs_by_name(tmp_path):
    decode, folder = own(tmp_path, "return [(rows[:, :4], rows[:, 4], rows[:, 5].astype(int)) for rows in outputs['out']]")
    assert isinstance(decode.function, UserFunction)
    (found,) = decode(
        {"out": np.array([[[1, 2, 3, 4, 0.2, 7], [0, 0, 1, 1, 0.6, 5]]], np.float32)}, [spec("out", 2, 6)], None, folder
    )
    assert found.labels.tolist() == [5, 7]
    assert found.boxes.tolist() == [[0, 0, 1, 1], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1", "one .boxes, scores, labels. an image; for 1 images it returns an int"),
        ("return []", "for 1 images it returns a list of 0"),
        ("return [(1, 2)]", "for one image it returns a tuple of 2"),
        ("return [(np.zeros((2, 4)), np.zeros(3), np.zeros(2, int))]", r"it returns \(2, 4\), \(3,\) and \(2,\)"),
        ("return [(np.full((1, 4), np.nan), np.ones(1), np.ones(1, int))]", "returns NaN or infinity"),
        ("raise KeyError('x')", r"fails: KeyError: 'x' \(.*mine\.py:3\)"),
    ],
)
def test_a_function_that_returns_something_else_is_named(tmp_path, body, message):
    decode, folder = own(tmp_path, body)
    with pytest.raises(UserCodeError, match=message):
        decode({"out": np.zeros((1, 2, 6), np.float32)}, [spec("out", 2, 6)], None, folder)


@pytest.mark.parametrize("text", ["yolov8", "", "none"])
def test_an_unknown_decode_is_refused(text):
    with pytest.raises(UsageError, match=r"unknown decode .*; expected yolo, ssd"):
        Decode.load(text)
