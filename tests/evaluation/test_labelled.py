import numpy as np
import pytest

from deploy.errors import BackendError, DataError
from deploy.evaluation import labelled as module
from deploy.evaluation.annotated import labelled
from deploy.evaluation.labelled import Batch, Remembered, out_of_order, run_batch


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["0", "1", "10", "2"], ["0", "1", "2", "10"]),
        (["class1", "class10", "class2"], ["class1", "class2", "class10"]),
        (["10-fold", "9-fold"], ["9-fold", "10-fold"]),
        (["00", "01", "02", "10"], []),
        (["0", "1", "2"], []),
        (["1", "10", "cat"], []),
        (["a1", "b10", "b2"], []),
        (["1", "10", "2 "], []),
        (["1.10", "1.2"], []),
        (["cat", "dog"], []),
    ],
)
def test_folders_called_by_numbers_are_found_where_their_order_is_another(names, ordered):
    assert names == sorted(names)
    assert out_of_order(names) == ordered


def test_images_come_with_the_indices_of_their_classes_and_their_files(model, tmp_path, make_folder):
    folder = make_folder(tmp_path, bee=[1, 1], cat=[2])
    data = labelled(model, folder)
    assert data.classes == ("bee", "cat")
    (first, second) = data.batches(2, None)
    assert first.targets.tolist() == [1, 1]
    assert second.targets.tolist() == [2]
    assert [path.name for path in (*first.files, *second.files)] == ["00.png", "01.png", "00.png"]


def told(data, size=2, skip=None):
    return [(batch.feed["input"].tolist(), batch.targets.tolist(), batch.files) for batch in data.batches(size, skip)]


def test_batches_that_are_remembered_are_read_once(model, tmp_path, make_folder):
    folder = make_folder(tmp_path, bee=[1, 1], cat=[2])
    data = Remembered(labelled(model, folder))
    assert (data.classes, data.kind, data.root, len(data.files)) == (("bee", "cat"), "classes", folder, 3)
    next(data.batches(2, None))  # not all: nothing is kept
    first = told(labelled(model, folder))
    for _ in range(2):
        for batch, expected in zip(data.batches(2, None), first, strict=True):
            assert (batch.feed["input"].tolist(), batch.targets.tolist(), batch.files) == expected
            batch.targets[:] = 7  # as a metric of the user's may
    assert told(data) == first
    (folder / "cat" / "00.png").unlink()
    assert told(data) == first
    for size, skip in ((1, None), (2, lambda path, error: pytest.fail("skipped") if path.name != "00.png" else None)):
        if skip is None:
            with pytest.raises(DataError, match=r"00\.png"):
                told(data, size)
        else:
            assert len(told(data, size, skip)) == 1  # what is left out is said again


@pytest.mark.parametrize(("most", "kept"), [(3 * 8 * 8 * 4 + 3 * 8, True), (3 * 8 * 8 * 4, False)])
def test_batches_are_remembered_up_to_a_limit(model, tmp_path, make_folder, most, kept, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", most)
    folder = make_folder(tmp_path, bee=[1, 1], cat=[2])
    data = Remembered(labelled(model, folder))
    told(data)
    (folder / "cat" / "00.png").unlink()
    if kept:
        assert len(told(data)) == 2
    else:
        with pytest.raises(DataError, match=r"00\.png"):
            told(data)


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_npz_files_have_labels_of_their_own_or_of_their_folder(model, tmp_path, layout):
    pixels = np.zeros((3, 1, 8, 8), np.float32)
    for name, labels in (("ant", [2, 0, 1]), ("bee", [1, 1, 5])):
        path = tmp_path / (name if layout == "folders" else ".") / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, input=pixels, **({"label": labels} if layout == "flat" else {}))
    batches = list(labelled(model, tmp_path).batches(2, None))
    assert [len(batch.feed["input"]) for batch in batches] == [2, 1, 2, 1]
    expected = [2, 0, 1, 1, 1, 5] if layout == "flat" else [0, 0, 0, 1, 1, 1]
    assert [label for batch in batches for label in batch.targets] == expected


@pytest.mark.parametrize("labels", [[0, 1], [[0], [1], [2]], [0.0, 1.0, 2.0], ["a", "b", "c"]])
def test_labels_that_are_not_one_index_a_row_are_refused_or_left_out(model, tmp_path, labels):
    np.savez(tmp_path / "0.npz", input=np.zeros((3, 1, 8, 8), np.float32), label=labels)
    data = labelled(model, tmp_path)
    with pytest.raises(DataError, match=r"0\.npz: 'label' is .*; expected 3 indices of classes"):
        list(data.batches(2, None))
    told = []
    assert list(data.batches(2, lambda path, error: told.append(path.name))) == []
    assert told == ["0.npz"]


def test_npz_files_without_labels_are_refused_at_once(model, tmp_path):
    np.savez(tmp_path / "0.npz", input=np.zeros((3, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"holds \.npz files without labels: 0\.npz has no array 'label'"):
        labelled(model, tmp_path)


class Refusing:
    """A session that runs nothing."""

    backend = "onnxruntime"

    def run(self, feed):
        raise BackendError("it does not run")


def test_a_single_file_that_the_model_does_not_run_with_is_left_out_and_a_batch_of_several_is_not(tmp_path):
    told = []
    one = Batch({}, np.zeros(1), (tmp_path / "a.png",))
    assert run_batch(Refusing(), one, lambda path, error: told.append(str(error))) is None
    assert told == [f"{tmp_path / 'a.png'}: it does not run"]
    for batch, skip in ((one, None), (Batch({}, np.zeros(2), (tmp_path / "a.png", tmp_path / "b.png")), told.append)):
        with pytest.raises(BackendError, match="it does not run"):
            run_batch(Refusing(), batch, skip)
