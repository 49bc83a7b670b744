import json

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from deploy.artifact.preprocess import Preprocess
from deploy.calibration import imagefolder
from deploy.errors import DataError, UsageError
from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.predict import predict

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]


def test_accuracy_is_the_share_of_images_whose_class_comes_first_and_among_five(model, tmp_path, make_folder):
    # Classes come in the order of their distance in brightness. Wrong are an ant taken for an emu and one for a gnu (ant
    # comes last for both), a cat for a dog (second), an emu for an ant (fifth) and a fox for an ant (sixth).
    folder = make_folder(tmp_path, ant=[0, 0, 4, 6], bee=[1], cat=[3, 2, 2], dog=[3], emu=[4, 0], fox=[5, 5, 0], gnu=[6, 6, 6])
    found = evaluate(model, folder, batch_size=5)
    assert (found.images, found.k, found.backend) == (17, 5, "onnxruntime")
    assert found.top1 == pytest.approx(100 * 12 / 17)
    assert found.top5 == pytest.approx(100 * 14 / 17)
    assert found.images_per_s > 0


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_accuracy_does_not_depend_on_the_batch_size(model, tmp_path, batch_size, make_folder):
    folder = make_folder(tmp_path, ant=[0, 1, 2, 3, 0], gnu=[6, 6, 0])
    assert evaluate(model, folder, batch_size=batch_size).top1 == pytest.approx(100 * 4 / 8)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_backend_asked_for_is_used(model, tmp_path, backend, make_folder):
    found = evaluate(model.path, make_folder(tmp_path, ant=[0], fox=[5, 1]), backend=backend, threads=1)
    assert (found.backend, found.top1) == (backend, pytest.approx(100 * 2 / 3))


def test_an_unknown_backend_is_refused(model, tmp_path, make_folder):
    with pytest.raises(UsageError, match="unknown backend 'onnx'"):
        evaluate(model, make_folder(tmp_path, ant=[0]), backend="onnx")


def test_a_folder_with_some_of_the_classes_is_paired_by_name(model, tmp_path, make_folder):
    assert evaluate(model, make_folder(tmp_path, emu=[4, 4, 4], gnu=[6])).top1 == 100


def test_an_unknown_folder_is_named_with_near_names(model, tmp_path, make_folder):
    with pytest.raises(DataError) as caught:
        evaluate(model, make_folder(tmp_path, ant=[0], bees=[1], zebra=[2]))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/bees (and 1 more) is no class of {model.path}, which has 7 of them")
    assert "'bee'" in message


def test_a_folder_whose_name_two_classes_share_is_refused(tmp_path, make_model, make_folder, paint):
    twins = make_model(tmp_path / "twins", classes=3, names=["crane", "dog", "crane"])
    with pytest.raises(DataError, match=r"data/crane may be any of 2 classes"):
        evaluate(twins, make_folder(tmp_path / "data", crane=[0], dog=[1]))
    assert evaluate(twins, paint(tmp_path / "dogs/dog/1.png", 128).parents[1]).top1 == 100


def test_without_names_the_sorted_folders_are_the_classes(tmp_path, make_model, make_folder):
    nameless = make_model(tmp_path / "nameless", names=None)
    folder = make_folder(tmp_path / "data", **{f"class{index}": [index] for index in range(7)})
    assert evaluate(nameless, folder).top1 == 100


@pytest.mark.parametrize("count", [None, "classes"], ids=["static", "symbolic"])
def test_without_names_the_folders_must_be_as_many_as_the_classes(tmp_path, count, make_model, make_folder):
    nameless = make_model(tmp_path / "nameless", names=None, count=count)
    with pytest.raises(DataError, match=r"data has 2 class folders and .*nameless 7 classes, without names.*--classes"):
        evaluate(nameless, make_folder(tmp_path / "data", a=[0], b=[1]))


def test_with_fewer_than_five_classes_top_five_is_over_all(tmp_path, make_model, paint):
    three = make_model(tmp_path / "three", classes=3, names=["a", "b", "c"])
    paint(tmp_path / "data/a/1.png", 255)
    found = evaluate(three, tmp_path / "data")
    assert (found.k, found.top1, found.top5) == (3, 0, 100)


def test_a_model_with_a_fixed_batch_is_fed_such_batches_and_progress_says_so(tmp_path, make_model, make_folder):
    fixed = make_model(tmp_path / "fixed", shape=(3, 1, 8, 8))
    folder = make_folder(tmp_path / "data", ant=[0, 0, 1, 0], gnu=[6, 6, 6])
    told = []
    found = evaluate(fixed, folder, batch_size=32, progress=lambda *call: told.append(call))
    assert (found.images, found.top1) == (7, pytest.approx(100 * 6 / 7))
    assert told == [("evaluating fixed (the model takes batches of 3 only)", done, 7) for done in (0, 3, 6, 7)]


def test_progress_counts_the_images(model, tmp_path, make_folder):
    told = []
    evaluate(model, make_folder(tmp_path, ant=[0] * 5), batch_size=2, progress=lambda *call: told.append(call))
    assert told == [("evaluating brightness", done, 5) for done in (0, 2, 4, 5)]


def test_images_of_many_sizes_go_one_by_one_where_the_model_takes_any(tmp_path, make_model, paint, shade):
    free = make_model(tmp_path / "free", shape=("batch", 1, "H", "W"), preprocess=Preprocess(channels=1))
    for index, size in enumerate([(8, 8), (20, 9), (3, 40)]):
        paint(tmp_path / "data/cat" / f"{index}.png", shade(2), size)
    told = []
    assert evaluate(free, tmp_path / "data", progress=lambda *call: told.append(call)).top1 == 100
    assert "images go one by one" in told[0][0]


def test_a_model_with_half_inputs_is_fed_halves(tmp_path, make_model, make_folder):
    half = make_model(tmp_path / "half", dtype=TensorProto.FLOAT16)
    assert evaluate(half, make_folder(tmp_path / "data", ant=[0], emu=[4])).top1 == 100


def test_a_corrupt_image_is_named(model, tmp_path, make_folder):
    folder = make_folder(tmp_path, ant=[0], bee=[1])
    (folder / "bee/broken.png").write_bytes((folder / "bee/00.png").read_bytes()[:40])
    for call in (lambda: evaluate(model, folder, batch_size=1), lambda: predict(model, [folder])):
        with pytest.raises(DataError, match=r"bee/broken\.png"):
            call()


@pytest.mark.parametrize("content", [None, "empty", "loose"])
def test_a_folder_that_is_no_imagefolder_is_refused(model, tmp_path, content, paint):
    root = tmp_path / "data"
    if content:
        root.mkdir()
    if content == "loose":
        paint(root / "1.png", 0)
    with pytest.raises(DataError, match=r"no folder at|holds nothing|no class folders"):
        evaluate(model, root)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_must_be_positive(model, tmp_path, batch_size, make_folder):
    with pytest.raises(UsageError, match="batch size must be 1 or more"):
        evaluate(model, make_folder(tmp_path, ant=[0]), batch_size=batch_size)


def test_an_evaluation_is_written_as_json(model, tmp_path, make_folder):
    found = evaluate(model, make_folder(tmp_path, ant=[0]))
    assert json.loads(json.dumps(found.to_json())) == {
        "schema": 1, "top1": 100.0, "top5": 100.0, "k": 5, "images": 1, "images_per_s": found.images_per_s, "backend": "onnxruntime", "file": "model.onnx",
        "metric": "top1", "value": 100.0, "unit": "%", "low": found.low, "high": 100.0, "confusions": [],
        "classes": [{"name": name, "value": 100.0 if name == "ant" else None, "count": int(name == "ant")} for name in NAMES],
    }  # fmt: skip


def test_a_batch_beyond_the_memory_is_an_error_with_its_size(model, tmp_path, monkeypatch, make_folder):
    folder = make_folder(tmp_path / "images", ant=[0, 0], bee=[1])

    def fail(*args, **options):
        raise MemoryError("Unable to allocate 4.47 TiB")
        yield

    monkeypatch.setattr(imagefolder, "batches", fail)
    message = "a batch size of 100000000 takes more memory than there is: Unable to allocate 4.47 TiB"
    with pytest.raises(UsageError, match=message):
        evaluate(model, folder, batch_size=100_000_000)
    with pytest.raises(UsageError, match=message):
        predict(model, folder, batch_size=100_000_000)


def test_folders_called_by_numbers_keep_the_order_of_training_and_it_is_said_where_that_is_another(
    tmp_path, make_model, make_folder, caplog
):
    classes = 12
    folder = tmp_path / "data"
    for place, name in enumerate(sorted(str(index) for index in range(classes))):  # the order of torchvision's ImageFolder
        Image.new("L", (8, 8), round(255 * place / (classes - 1))).save(_made(folder / name) / "0.png")
    nameless = make_model(tmp_path / "nameless", names=None, classes=classes)
    assert evaluate(nameless, folder).top1 == 100
    assert "called by numbers" in caplog.text
    assert "class 2 is '10', not '2'" in caplog.text
    named = make_model(tmp_path / "named", names=[str(index) for index in range(classes)], classes=classes)
    for name in range(classes):
        Image.new("L", (8, 8), round(255 * name / (classes - 1))).save(folder / str(name) / "0.png")
    assert evaluate(named, folder).top1 == 100
    assert evaluate(nameless, folder).top1 < 50
    assert caplog.text.count("called by numbers") == 1


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_files_that_cannot_be_used_are_told_once_and_left_out(model, tmp_path, make_folder):
    folder = make_folder(tmp_path, ant=[0, 1, 0], gnu=[6])
    (folder / "ant/01.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ant/01\.png"):
        evaluate(model, folder)
    told = []
    found = evaluate(model, folder, skip=lambda path, error: told.append((path, type(error))))
    assert (found.images, found.top1, len(found.ranks)) == (3, 100, 3)
    assert told == [(folder / "ant/01.png", DataError)]


def test_an_image_that_the_model_does_not_run_with_is_left_out(tmp_path, make_model, make_folder, paint):
    tiny = make_model(tmp_path / "tiny", shape=("batch", 1, "H", 8), preprocess=Preprocess(channels=1))
    folder = make_folder(tmp_path / "data", ant=[0], gnu=[6])
    paint(folder / "ant/wide.png", 0, (9, 8))
    told = []
    assert evaluate(tiny, folder, skip=lambda path, error: told.append(path.name)).images == 2
    assert told == ["wide.png"]


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_that_is_no_class_is_refused(model, tmp_path, label):
    np.savez(tmp_path / "0.npz", input=np.zeros((2, 1, 8, 8), np.float32), label=[0, label])
    with pytest.raises(DataError, match=rf"0\.npz has the label {label}; expected 0 to 6"):
        evaluate(model, tmp_path)


def test_accuracy_on_npz_files_is_that_on_the_images_they_were_made_of(model, tmp_path, make_folder):
    folder = make_folder(tmp_path / "images", ant=[0, 1], gnu=[6, 6, 0])
    for path in folder.rglob("*.png"):
        array = np.asarray(Image.open(path), np.float32)[None, None] / 255
        np.savez(_made(tmp_path / "npz" / path.parent.name) / f"{path.stem}.npz", input=array)
    assert evaluate(model, tmp_path / "npz").top1 == evaluate(model, folder).top1 == 60
