"""Predictions for many files: in order, in batches, ahead of need, and one bad file is one row."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.data.images import ImageInput
from deploy.errors import UsageError
from deploy.evaluation.batch import Item, Predictor, Row
from deploy.evaluation.many_options import BatchOptions
from deploy.evaluation.predict import predict


def names(row: Row) -> list[str] | None:
    """Of the classes in a row, the likeliest first."""
    return None if row.result is None else [each["class"] for each in row.result.values["classes"]]


def first(row: Row) -> str | None:
    found = names(row)
    return None if found is None else found[0]


def rows_of(model: Any, paths: list[Path], **options: Any) -> list[Row]:
    with Predictor(model, BatchOptions(**options)) as predictor:
        return [row for rows in predictor.rows(Item(path=path) for path in paths) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_rows_are_those_of_predict_in_order_whatever_the_batch(model, tmp_path, paint, shade, batch_size) -> None:
    paths = [paint(tmp_path / f"{index}.png", shade(index % 7)) for index in range(20)]
    found = rows_of(model, paths, batch_size=batch_size, top=2)
    wanted = predict(model, paths, top=2)
    assert [row.path for row in found] == list(map(str, paths))
    for row, prediction in zip(found, wanted, strict=True):
        assert names(row) == [name for name, _ in prediction.classes]


def test_a_bad_file_is_a_row_with_its_error_and_the_others_have_theirs(model, tmp_path, paint, shade) -> None:
    paths = [paint(tmp_path / f"{index}.png", shade(index)) for index in range(5)]
    paths[1].write_bytes(b"no image")
    paths[3] = tmp_path / "none.png"
    found = rows_of(model, paths, batch_size=2)
    assert [row.error is None for row in found] == [True, False, True, False, True]
    assert [row.path for row in found] == list(map(str, paths))
    assert "none.png" in str(found[3].error)
    assert found[1].to_json() == {"path": str(paths[1]), "error": found[1].error}
    assert [first(found[at]) for at in (0, 2, 4)] == ["ant", "cat", "emu"]


def test_npz_files_have_a_row_for_each_of_theirs_from_where_it_is_wanted(model, tmp_path, paint, shade) -> None:
    levels = np.array([shade(label) / 255 for label in range(7)], np.float32)
    np.savez(tmp_path / "x.npz", input=np.broadcast_to(levels[:, None, None, None], (7, 1, 8, 8)))
    np.savez(tmp_path / "bad.npz", other=levels)
    image = paint(tmp_path / "a.png", shade(3))
    with Predictor(model, BatchOptions(batch_size=3)) as predictor:
        items = [Item(path=image), Item(path=tmp_path / "x.npz", start=4), Item(path=tmp_path / "bad.npz"), Item(path=image)]
        found = [row for rows in predictor.rows(iter(items)) for row in rows]
    assert [(Path(row.path).name, row.row, first(row)) for row in found] == [
        ("a.png", None, "dog"), ("x.npz", 4, "emu"), ("x.npz", 5, "fox"), ("x.npz", 6, "gnu"), ("bad.npz", None, None),
        ("a.png", None, "dog"),
    ]  # fmt: skip


def test_a_fixed_batch_is_filled_up(tmp_path, make_model, paint, shade) -> None:
    fixed = make_model(tmp_path / "fixed", shape=(4, 1, 8, 8))
    paths = [paint(tmp_path / f"{index}.png", shade(index)) for index in range(6)]
    assert [first(row) for row in rows_of(fixed, paths)] == ["ant", "bee", "cat", "dog", "emu", "fox"]


def test_images_are_decoded_while_others_are_computed_and_not_far_ahead(model, tmp_path, paint, monkeypatch) -> None:
    image = paint(tmp_path / "a.png", 0)
    taken = decoded = 0
    load = ImageInput.load

    def counted(self: ImageInput, source: Any) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return load(self, source)

    def items() -> Iterator[Item]:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield Item(path=image)

    monkeypatch.setattr(ImageInput, "load", counted)
    with Predictor(model, BatchOptions(batch_size=4, workers=2)) as predictor:
        run, runs = predictor._session.run, 0

        def waiting(feed: Any) -> Any:
            """A run of the model, during which the images of the next batch are decoded."""
            nonlocal runs
            runs += 1
            end = time.monotonic() + 20
            while decoded < min(4 * (runs + 1), 40) and time.monotonic() < end:
                time.sleep(0.001)
            assert decoded >= min(4 * (runs + 1), 40)
            return run(feed)

        monkeypatch.setattr(predictor._session, "run", waiting)
        for count, _ in enumerate(predictor.rows(items()), 1):
            assert taken <= 4 * (count + 1) + 3 * 4
    assert runs == 10


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"top": 0}, {"batch_size": 0}, {"workers": 0}):
        with pytest.raises(UsageError):
            BatchOptions(**wrong)
