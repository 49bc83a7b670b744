"""Predictions into a file: as they are computed, and on from where they were interrupted."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from deploy.artifact.artifact import Artifact
from deploy.errors import DataError, OutputError, UsageError
from deploy.evaluation.batch import Item, Row
from deploy.evaluation.many import predict_many, rows_here
from deploy.evaluation.many_options import BatchOptions

SMALL = BatchOptions(batch_size=4, top=1)


def read(path: Path) -> list[tuple[str, int | None, bool]]:
    if path.suffix == ".parquet":
        return [(row["path"], row["row"], row["error"] is not None) for row in parquet.read_table(path).to_pylist()]
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    return [(each["path"], each.get("row"), "error" in each) for each in documents]


@pytest.fixture
def images(tmp_path, paint, shade, monkeypatch) -> Path:
    for index in range(30):
        paint(tmp_path / "images" / f"{index:02d}.png", shade(index % 7))
    (tmp_path / "images/05.png").write_bytes(b"no image")
    np.savez(tmp_path / "images/x.npz", input=np.zeros((10, 1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WANTED = [(f"images/{index:02d}.png", None, index == 5) for index in range(30)] + [
    ("images/x.npz", row, False) for row in range(10)
]


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.parquet"])
def test_every_image_is_a_row_and_a_second_run_does_nothing(model: Artifact, images: Path, out: str) -> None:
    assert predict_many(model, ["images"], out, SMALL) == (40, 1)
    assert read(Path(out)) == WANTED
    before = Path(out).stat().st_mtime_ns

    def none(*_: Any) -> Iterator[list[Row]]:
        raise AssertionError("nothing is left to compute")
        yield []

    assert predict_many(model, ["images"], out, SMALL, rows=none) == (40, 1)
    assert Path(out).stat().st_mtime_ns == before
    assert sorted(path.name for path in images.glob("rows*")) == [out, f"{out}.run.json"]


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("after", [1, 7, 36])
def test_an_interrupted_run_goes_on_without_repeating_a_row(model: Artifact, images: Path, out: str, after: int) -> None:
    computed: list[str] = []

    def some(artifact: Artifact, options: BatchOptions, items: Iterator[Item], most: int = 99) -> Iterator[list[Row]]:
        count = 0
        for rows in rows_here(artifact, options, items):
            if count + len(rows) > most:
                raise KeyboardInterrupt
            count += len(rows)
            computed.extend(f"{row.path} {row.row}" for row in rows)
            yield rows

    with pytest.raises(KeyboardInterrupt):
        predict_many(model, ["images"], out, SMALL, rows=lambda *given: some(*given, most=after))
    assert predict_many(model, ["images"], out, SMALL, rows=some) == (40, 1)
    assert read(Path(out)) == WANTED
    assert len(computed) == len(set(computed)) == 40


def test_half_a_line_is_taken_away(model: Artifact, images: Path) -> None:
    predict_many(model, ["images"], "rows.jsonl", SMALL)
    whole = Path("rows.jsonl").read_bytes()
    note = json.loads(Path("rows.jsonl.run.json").read_text())
    Path("rows.jsonl.run.json").write_text(json.dumps({**note, "finished": None}))
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        Path("rows.jsonl").write_bytes(whole[:cut])
        assert predict_many(model, ["images"], "rows.jsonl", SMALL) == (40, 1)
        assert Path("rows.jsonl").read_bytes() == whole
        Path("rows.jsonl.run.json").write_text(json.dumps({**note, "finished": None}))


def test_a_process_that_is_killed_goes_on(model: Artifact, images: Path) -> None:
    program = f"""
        import time
        from deploy.evaluation.batch import Predictor
        from deploy.evaluation.many import predict_many
        from deploy.evaluation.many_options import BatchOptions
        run = Predictor._images_of
        Predictor._images_of = lambda *given: (time.sleep(0.2), run(*given))[1]
        predict_many({str(model.path)!r}, ["images"], "rows.jsonl", BatchOptions(batch_size=4, top=1))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 60
    while not Path("rows.jsonl").exists() or Path("rows.jsonl").stat().st_size < 200:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(read(Path("rows.jsonl")))
    assert 0 < there < 40
    reports: list[tuple[int, int]] = []
    assert predict_many(model, ["images"], "rows.jsonl", SMALL, report=lambda *given: reports.append(given)) == (40, 1)
    assert read(Path("rows.jsonl")) == WANTED
    assert reports[0][0] > there


def test_a_file_of_something_else_is_left_as_it_is(model: Artifact, images: Path) -> None:
    Path("mine.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="not of `deploy predict`"):
        predict_many(model, ["images"], "mine.jsonl", SMALL)
    assert Path("mine.jsonl").read_text() == "mine"
    predict_many(model, ["images"], "rows.jsonl", SMALL)
    with pytest.raises(OutputError, match=r"another run \(top\)"):
        predict_many(model, ["images"], "rows.jsonl", BatchOptions(top=2))
    with pytest.raises(OutputError, match=r"another run \(sources\)"):
        predict_many(model, ["images/x.npz"], "rows.jsonl", SMALL)
    for name, error, message in (
        ("x.csv", UsageError, "must end with .jsonl or .parquet"),
        ("no/x.jsonl", OutputError, "no folder at no"),
    ):
        with pytest.raises(error, match=message):
            predict_many(model, ["images"], name, SMALL)
    with pytest.raises(DataError, match="nothing is at none"):
        predict_many(model, ["none"], "other.jsonl", SMALL)
    assert not Path("other.jsonl").exists()


def test_files_that_changed_since_the_interruption_are_noticed(model: Artifact, images: Path) -> None:
    def two(artifact: Artifact, options: BatchOptions, items: Iterator[Item]) -> Iterator[list[Row]]:
        yield [Row(path=str(item.path), error="x") for item, _ in zip(items, range(2), strict=False)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_many(model, ["images"], "rows.jsonl", SMALL, rows=two)
    Path("images/00.png").unlink()
    with pytest.raises(OutputError, match="the files have changed"):
        predict_many(model, ["images"], "rows.jsonl", SMALL)
