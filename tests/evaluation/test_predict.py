import json

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import DataError, UsageError
from deploy.evaluation.predict import predict

SHARPNESS = 100.0
"""That of `make_model`."""


def test_a_prediction_names_the_likeliest_classes_with_probabilities(model, tmp_path, paint, shade):
    image = paint(tmp_path / "grey.png", shade(2))
    (found,) = predict(model, [image], top=3)
    assert found.path == image
    assert found.classes[0][0] == "cat"
    assert {name for name, _ in found.classes} == {"bee", "cat", "dog"}
    mean = np.float64(shade(2)) / 255
    powers = np.exp(-SHARPNESS * (mean - np.arange(7) / 6) ** 2)
    expected = sorted(powers / powers.sum(), reverse=True)[:3]
    assert [probability for _, probability in found.classes] == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(found.to_json()))["classes"][0] == {"class": "cat", "probability": pytest.approx(expected[0])}


def test_directories_stand_for_the_images_in_them_and_the_order_is_kept(model, tmp_path, paint, shade):
    last = paint(tmp_path / "zz.png", shade(6))
    first = [paint(tmp_path / "many" / name, shade(label)) for label, name in enumerate(["a.png", "b.png", "deep/c.png"])]
    (tmp_path / "many/notes.txt").write_text("not an image")
    found = predict(model, [last, tmp_path / "many", str(last)], batch_size=2)
    assert [prediction.path for prediction in found] == [last, *first, last]
    assert [prediction.classes[0][0] for prediction in found] == ["gnu", "ant", "bee", "cat", "gnu"]


def test_a_class_without_a_name_is_called_by_its_index(tmp_path, make_model, paint, shade):
    nameless = make_model(tmp_path / "nameless", names=None)
    (found,) = predict(nameless, [paint(tmp_path / "x.png", shade(5))], top=100)
    assert found.classes[0][0] == "5"
    assert sorted(name for name, _ in found.classes) == [str(index) for index in range(7)]
    assert sum(probability for _, probability in found.classes) == pytest.approx(1)


@pytest.mark.parametrize(("paths", "message"), [(["gone.png"], "no image at"), (["."], "holds no images")])
def test_what_holds_no_image_is_named(model, tmp_path, paths, message):
    with pytest.raises(DataError, match=message):
        predict(model, [tmp_path / path for path in paths])


def test_predict_needs_an_image_and_a_positive_top(model, tmp_path, paint):
    with pytest.raises(UsageError, match="no image to predict"):
        predict(model, [])
    with pytest.raises(UsageError, match="top must be 1 or more"):
        predict(model, [paint(tmp_path / "x.png", 0)], top=0)


def test_paths_that_cannot_be_used_are_told_and_left_out(model, tmp_path, paint, shade):
    good = [paint(tmp_path / "many" / name, shade(label)) for label, name in enumerate(["a.png", "c.png"])]
    (tmp_path / "many/b.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "gone.png", tmp_path / "empty", tmp_path / "many"]
    told = []
    found = predict(model, paths, skip=lambda path, error: told.append((path, type(error))))
    assert [(each.path, each.classes[0][0]) for each in found] == [(good[0], "ant"), (good[1], "bee")]
    assert told == [(path, DataError) for path in (*paths[:2], tmp_path / "many/b.png")]
    assert predict(model, paths[:2], skip=lambda *_: None) == []
    with pytest.raises(DataError, match="no image at"):
        predict(model, paths)


def two_inputs(out):
    """A classifier whose scores are the numbers of its vector, whatever the image."""
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Mul", ["flat", "none"], ["zero"]),
            helper.make_node("Add", ["zero", "vector"], ["scores"]),
        ],
        "two",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ("N", 1, 8, 8)),
            helper.make_tensor_value_info("vector", TensorProto.FLOAT, ("N", 3)),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("N", 3))],
        [onnx.numpy_helper.from_array(np.zeros(1, np.float32), "none")],
    )
    with ArtifactWriter(out) as writer:
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), writer.path / ONNX)
        manifest = open_onnx(writer.path / ONNX).manifest
        return writer.commit(msgspec.structs.replace(manifest, name=out.name, preprocess=Preprocess(channels=1), image="image"))


def test_an_image_finds_its_row_in_the_nearest_table_up_from_it(tmp_path, paint, monkeypatch):
    net = Artifact.open(two_inputs(tmp_path / "net").path)
    for folder, row in (("one", "deep/a.png,0,9,0"), ("two", "a.png,0,0,9")):
        paint(tmp_path / folder / row.partition(",")[0], 0)
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,vector_0,vector_1,vector_2\n{row}\n")
    monkeypatch.chdir(tmp_path / "one/deep")
    for path in ("a.png", ".", "../deep/a.png", "..", str(tmp_path / "one/deep/a.png")):
        assert [each.classes[0][0] for each in predict(net, path)] == ["1"], path
    assert [each.classes[0][0] for each in predict(net, ["a.png", "../../two"])] == ["1", "2"]
    paint(tmp_path / "two/b.png", 0)
    told = []
    assert len(predict(net, ["a.png", tmp_path / "two"], skip=lambda path, error: told.append(str(error)))) == 2
    (message,) = told
    assert "b.png has no row in" in message
