import numpy as np
import pytest

from deploy.errors import UsageError, UserCodeError
from deploy.evaluation.evaluate import evaluate

OWN = """
import numpy as np

class Share:
    '''The share of rows whose class is right, with numpy alone.'''
    made = 0

    def __init__(self):
        self.reset()

    def reset(self):
        self.right = self.count = 0

    def update(self, outputs, targets):
        assert type(outputs) is np.ndarray and type(targets) is np.ndarray, type(outputs)
        self.right += int((outputs.argmax(1) == targets).sum())
        self.count += len(targets)

    def compute(self):
        return self.right / self.count

one = Share()
same = lambda: one

class Nan(Share):
    def compute(self):
        return float("nan")

class Text(Share):
    def compute(self):
        return {"a": 1.0}

class Raises(Share):
    def update(self, outputs, targets):
        raise ValueError("no such thing")

class Boxes:
    '''How many boxes are found for each that is there.'''
    def __init__(self): self.found = self.there = 0
    def update(self, outputs, targets):
        self.found += sum(int((each["scores"] > 0.5).sum()) for each in outputs)
        self.there += sum(len(each["boxes"]) for each in targets)
    def compute(self): return np.float32(self.found / self.there)

boxes = Boxes()
def stuck():
    return boxes

def nothing():
    return 3
"""

IGNITE = """
import ignite.metrics, torchmetrics

def accuracy():
    return ignite.metrics.Accuracy()

def f1():
    return torchmetrics.classification.MulticlassAccuracy(num_classes=7, average="micro")

object = torchmetrics.classification.MulticlassAccuracy(num_classes=7, average="micro")

def jaccard():
    return torchmetrics.classification.MulticlassJaccardIndex(num_classes=3, ignore_index=255)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "theirs.py").write_text(IGNITE)
    return tmp_path


@pytest.fixture
def folder(tmp_path, make_folder):
    """Twelve images, nine of them right."""
    return make_folder(tmp_path / "data", ant=[0, 0, 4, 0], cat=[2, 2, 2, 3], emu=[4, 4, 4, 0])


@pytest.mark.parametrize("name", ["own.py:Share", "theirs.py:accuracy", "theirs.py:f1", "theirs.py:object"])
def test_objects_of_numpy_of_ignite_and_of_torchmetrics_work_as_they_are(model, own, folder, name):
    found = evaluate(model, folder, metric=f"{own}/{name}", batch_size=5)
    assert found.value == pytest.approx(9 / 12)
    assert (found.metric, found.unit, found.top1, found.images) == (f"{own}/{name}", "", None, 12)
    assert found.low < found.value < found.high


def test_one_object_for_all_has_no_interval(model, own, folder):
    found = evaluate(model, folder, metric=f"{own}/own.py:same")
    assert (found.value, found.low) == (pytest.approx(9 / 12), None)
    assert evaluate(model, folder, metric=f"{own}/own.py:same").value == pytest.approx(9 / 12)  # reset between


def test_the_loss_is_turned_where_less_is_better(model, own, folder):
    first = evaluate(model, folder, metric=f"{own}/own.py:Share").measured
    second = evaluate(model, folder, metric=f"lower:{own}/own.py:Share").measured
    assert (first.lower, second.lower) == (False, True)
    second._value = second.compute() + 0.1
    assert second.loss(first) == pytest.approx(0.1)


def test_masks_come_as_logits_and_class_indices(make_segmenter, scenes, own):
    artifact = make_segmenter(own / "net")
    found = evaluate(artifact, scenes, metric=f"{own}/theirs.py:jaccard", batch_size=4)
    assert found.value == pytest.approx(evaluate(artifact, scenes, metric="miou").value / 100, abs=1e-6)


def test_boxes_come_as_a_dict_an_image(make_detector, boxes, own):
    artifact = make_detector(own / "net", names=["grey", "bright"])
    assert evaluate(artifact, boxes, metric=f"{own}/own.py:Boxes", batch_size=3).value == 1


def test_targets_of_npz_files_are_given_as_they_are(model, own):
    (own / "feeds").mkdir()
    rng = np.random.default_rng(0)
    np.savez(own / "feeds/0.npz", input=rng.random((12, 1, 8, 8), np.float32), target=np.arange(12, dtype=np.float64) / 3)
    (own / "npz.py").write_text(
        "import numpy as np\nclass Sum:\n    total = 0.0\n    def update(self, outputs, targets): self.total += float(targets.sum())\n"
        "    def compute(self): return self.total\n"
    )
    assert evaluate(model, own / "feeds", metric=f"{own}/npz.py:Sum", batch_size=5).value == pytest.approx(22)


def test_targets_of_one_sample_need_no_batch_where_its_inputs_have_none(make_segmenter, own):
    (own / "feeds").mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        mask = rng.integers(0, 3, (16, 16), dtype=np.uint8)
        np.savez(own / f"feeds/{index}.npz", input=mask[None].astype(np.float32) / 2, label=mask)
    artifact = make_segmenter(own / "net")
    found = evaluate(artifact, own / "feeds", metric=f"{own}/theirs.py:jaccard").value
    assert found == pytest.approx(evaluate(artifact, own / "feeds", metric="miou").value / 100, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own.py:Nan", UserCodeError, r"compute\(\) returns nan for 12 images; expected a number; it was tried on one batch of 12 rows"),
        ("own.py:Text", UserCodeError, r"compute\(\) returns a dict; expected one number: name a class of yours that returns one of 'a'; it was tried on one batch"),
        ("own.py:Raises", UserCodeError, r"update\(\) fails: ValueError: no such thing \(.*own\.py:35\)"),
        ("own.py:nothing", UserCodeError, r"returns an int without update\(\).*expected an object with update\(outputs, targets\)"),
        ("own.py:stuck", UserCodeError, r"returns the same object every time, and it has no reset\(\)"),
        ("own.py:absent", UserCodeError, r"has no 'absent'"),
        ("none.py:Share", UsageError, r"no Python file .*none\.py"),
    ],
)  # fmt: skip
def test_a_metric_that_fails_is_known_before_the_work(model, own, folder, name, error, message):
    told = []
    with pytest.raises(error, match=message):
        evaluate(model, folder, metric=f"{own}/{name}", progress=lambda *call: told.append(call))
    assert told == []  # nothing was measured yet
