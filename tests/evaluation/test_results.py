"""What stands in the rows of predictions: classes, masks, boxes, or the outputs as they are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from deploy.artifact.artifact import Artifact
from deploy.artifact.preprocess import Preprocess
from deploy.errors import UsageError
from deploy.evaluation import rows as evaluation_rows
from deploy.evaluation.batch import Row
from deploy.evaluation.many import predict_many, rows_here
from deploy.evaluation.many_options import BatchOptions
from deploy.evaluation.predict import predict

from .conftest import save_graph


def rows_of(artifact: Artifact, sources: list[Path], out: Path, **options: Any) -> list[dict[str, Any]]:
    predict_many(artifact, list(map(str, sources)), out, BatchOptions(batch_size=4, **options))
    if out.suffix == ".parquet":
        return list(parquet.read_table(out).to_pylist())
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_boxes_are_those_of_predict_in_the_pixels_of_the_picture(make_detector, boxes, tmp_path) -> None:
    artifact = make_detector(tmp_path / "net", names=["grey", "bright"])
    images = boxes.parent / "images"
    wanted = [each.to_json()["boxes"] for each in predict(artifact, images, min_score=0.5)]
    found = rows_of(artifact, [images], tmp_path / "x.jsonl", min_score=0.5)
    assert [row["boxes"] for row in found] == wanted
    assert sum(map(len, wanted)) > 5
    columns = rows_of(artifact, [images], tmp_path / "x.parquet", min_score=0.5)
    for row, each in zip(columns, wanted, strict=True):
        assert row["classes"] == [box["class"] for box in each]
        assert row["scores"] == [box["score"] for box in each]
        assert row["boxes"] == [box["box"] for box in each]
        assert row["error"] is None


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_masks_are_files_beside_the_rows_which_name_them(make_segmenter, scenes, tmp_path, suffix) -> None:
    artifact = make_segmenter(tmp_path / "net", names=["dark", "grey", "bright"])
    (scenes / "images" / "2.png").write_bytes(b"no image")
    wanted = {each.path.name: each for each in predict(artifact, scenes / "images", skip=lambda *_: None)}
    found = rows_of(artifact, [scenes / "images"], tmp_path / f"x.{suffix}")
    assert [Path(row["path"]).name for row in found] == [f"{index}.png" for index in range(6)]
    for index, row in enumerate(found):
        if index == 2:
            assert "no image" in row["error"] or "not an image" in row["error"]
            continue
        assert row["mask"] == str(tmp_path / f"x.{suffix}.masks" / f"{index:08d}.png")
        each = wanted[Path(row["path"]).name]
        np.testing.assert_array_equal(np.asarray(Image.open(row["mask"])), each.mask)
        if suffix == "jsonl":
            assert [(share["class"], share["share"]) for share in row["classes"]] == list(each.classes)
        else:
            assert list(zip(row["classes"], row["shares"], strict=True)) == list(each.classes)


def test_npz_rows_have_boxes_and_masks_in_the_pixels_of_the_array(make_detector, make_segmenter, tmp_path) -> None:
    x = np.zeros((2, 1, 16, 16), np.float32)
    x[1, 0, 8:, 8:] = 1
    np.savez(tmp_path / "x.npz", input=x)
    found = rows_of(make_detector(tmp_path / "detector"), [tmp_path / "x.npz"], tmp_path / "boxes.jsonl", min_score=0.9)
    assert [[box["box"] for box in row["boxes"]] for row in found] == [[], [[8.0, 8.0, 16.0, 16.0]]]
    found = rows_of(make_segmenter(tmp_path / "segmenter"), [tmp_path / "x.npz"], tmp_path / "masks.jsonl")
    assert [row["row"] for row in found] == [0, 1]
    np.testing.assert_array_equal(np.asarray(Image.open(found[1]["mask"])), np.where(x[1, 0] == 1, 2, 0))


def test_a_model_of_no_task_has_its_outputs_in_the_rows(tmp_path) -> None:
    text = """g (float[N, 3] x, int64[N] k) => (float[N, 2, 3] twice, int64[N] more, bool[N, 3] large)
        <float[1, 2, 1] w = {1, 2}, int64[1] axis = {1}, int64 one = {1}, float half = {0.5}> {
        wide = Unsqueeze(x, axis) twice = Mul(wide, w) more = Add(k, one) large = Greater(x, half) }"""
    artifact = save_graph(tmp_path / "net", text)
    x = np.array([[0.1, 2.0, np.nan], [3.0, 4.0, np.inf], [0.0, -1.0, 7.0]], np.float32)
    np.savez(tmp_path / "x.npz", x=x, k=np.array([2**62, -5, 3]))
    found = rows_of(artifact, [tmp_path / "x.npz"], tmp_path / "x.jsonl")
    assert found[0]["outputs"] == {
        "twice": [[float(np.float32(0.1)), 2.0, None], [float(np.float32(0.2)), 4.0, None]], "more": 2**62 + 1, "large": [False, True, False],
    }  # fmt: skip
    columns = rows_of(artifact, [tmp_path / "x.npz"], tmp_path / "x.parquet")
    np.testing.assert_array_equal([row["twice"] for row in columns], x[:, None] * np.array([[1], [2]]))
    assert [row["more"] for row in columns] == [2**62 + 1, -4, 4]
    assert [row["large"] for row in columns] == (x > 0.5).tolist()


def test_raw_gives_the_outputs_of_any_model(model, tmp_path, paint, shade) -> None:
    image = paint(tmp_path / "a.png", shade(3))
    (row,) = rows_of(model, [image], tmp_path / "x.jsonl", raw=True)
    assert int(np.argmax(row["outputs"]["logits"])) == 3
    assert len(row["outputs"]["logits"]) == 7


def test_what_cannot_stand_in_rows_is_said_before_the_work(tmp_path, make_segmenter, paint) -> None:
    image = str(paint(tmp_path / "a.png", 1))
    whole = save_graph(tmp_path / "whole", "g (float[N, 1, 8, 8] input) => (float[4] all) <float[4] all = {1, 2, 3, 4}> { }")
    with pytest.raises(UsageError, match="which has no row for each image"):
        predict_many(whole, [image], tmp_path / "x.jsonl")
    text = "g (float[N, 1, 8, 8] input) => (float[N, 1, 8, 8] error) { error = Identity(input) }"
    taken = save_graph(tmp_path / "taken", text, preprocess=Preprocess(channels=1))
    with pytest.raises(UsageError, match="an output is called 'error'"):
        predict_many(taken, [image], tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="`min_score` must be 0 to 1"):
        BatchOptions(min_score=2)
    named = make_segmenter(tmp_path / "net", names=["one", "two"])
    with pytest.raises(UsageError, match="3 classes and 2 class names"):
        predict_many(named, [image], tmp_path / "x.jsonl")
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_run_in_the_folder_of_its_images_does_not_take_its_masks_for_images(
    make_segmenter, scenes, monkeypatch, suffix
) -> None:
    artifact = make_segmenter(scenes.parent / "net")
    monkeypatch.chdir(scenes / "images")

    def some(*given: Any) -> Iterator[list[Row]]:
        yield next(row for row in rows_here(*given) if row)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_many(artifact, ["."], f"x.{suffix}", BatchOptions(batch_size=4), rows=some)
    assert len(list(Path(f"x.{suffix}.masks").iterdir())) == 1
    assert predict_many(artifact, ["."], f"x.{suffix}", BatchOptions(batch_size=4)) == (6, 0)
    assert len(list(Path(f"x.{suffix}.masks").iterdir())) == 6


def test_many_numbers_are_not_held_until_there_are_many_rows(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_rows, "_NUMBERS_OF_A_PART", 20)  # three rows of seven
    np.savez(tmp_path / "x.npz", input=np.zeros((16, 1, 8, 8), np.float32))
    parts: list[int] = []
    clean = evaluation_rows.Parquet.clean
    counted = lambda self: (parts.extend(parquet.read_table(part).num_rows for part in self._parts()), clean(self))  # noqa: E731
    monkeypatch.setattr(evaluation_rows.Parquet, "clean", counted)
    assert len(rows_of(model, [tmp_path / "x.npz"], tmp_path / "x.parquet", raw=True)) == 16
    assert parts == [3, 3, 3, 3, 3, 1]
