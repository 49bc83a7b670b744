"""Predictions on Ray: an actor by itself, and at full length a cluster of two nodes of which one is killed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

import msgspec
import pyarrow

from deploy.errors import UsageError
from deploy.evaluation.batch import Item, Predictor, Row
from deploy.evaluation.many import predict_many
from deploy.evaluation.many_options import ActorOptions, BatchOptions
from deploy.evaluation.ray_rows import _SCHEMA, _Actor, rows_on_ray

SOAK = bool(os.environ.get("DEPLOY_SOAK"))
SMALL = BatchOptions(batch_size=8, top=1)


def test_an_actor_has_a_row_for_each_of_its_paths(model, tmp_path, paint, shade) -> None:
    image = paint(tmp_path / "a.png", shade(2))
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    np.savez(tmp_path / "x.npz", input=np.ones((3, 1, 8, 8), np.float32))
    paths = [os.fsencode(image), strange, os.fsencode(tmp_path / "x.npz")]
    table = _Actor(str(model.path), SMALL)(pyarrow.table({"path": paths, "start": [0, 0, 1]}, schema=_SCHEMA))
    found = [msgspec.msgpack.decode(row, type=Row) for row in table["row"].to_pylist()]
    with Predictor(model, SMALL) as predictor:
        items = (Item(path=Path(os.fsdecode(path)), start=start) for path, start in zip(paths, (0, 0, 1), strict=True))
        assert found == [row for rows in predictor.rows(items) for row in rows]
    assert [(Path(row.path).name, row.row, row.error is None) for row in found] == [
        ("a.png", None, True), ("caf\\xe9.png", None, False), ("x.npz", 1, True), ("x.npz", 2, True),
    ]  # fmt: skip


def test_masks_and_raw_outputs_come_back_from_an_actor(make_segmenter, tmp_path, paint) -> None:
    artifact = make_segmenter(tmp_path / "net")
    paths = [os.fsencode(paint(tmp_path / f"{level}.png", level)) for level in (20, 230)]
    block = pyarrow.table({"path": paths, "start": [0, 0]}, schema=_SCHEMA)
    for options in (SMALL, BatchOptions(raw=True)):
        table = _Actor(str(artifact.path), options)(block)
        found = [msgspec.msgpack.decode(row, type=Row) for row in table["row"].to_pylist()]
        with Predictor(artifact, options) as predictor:
            assert found == [row for rows in predictor.rows(Item(path=Path(os.fsdecode(path))) for path in paths) for row in rows]


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"actors": 0}, {"actor_cpus": -1}, {"actor_gpus": float("nan")}):
        with pytest.raises(UsageError):
            ActorOptions(**wrong)


@pytest.mark.skipif(not SOAK, reason="a cluster takes a minute: make soak")
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of Ray Data about itself
def test_every_image_is_answered_once_while_a_node_is_killed(model, tmp_path, paint, shade, monkeypatch) -> None:
    from ray.cluster_utils import Cluster

    for index in range(2000):
        paint(tmp_path / "images" / f"{index:04d}.png", shade(index % 7))
    (tmp_path / "images/0003.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        doomed = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        killed = False

        def rows(*given: Any) -> Iterator[Any]:
            nonlocal killed
            for count, made in enumerate(rows_on_ray(*given, ActorOptions(address=cluster.address, actors=2))):
                if count == 20:
                    cluster.remove_node(doomed, allow_graceful=False)  # SIGKILL to all of its processes
                    killed = True
                time.sleep(0.02)
                yield made

        assert predict_many(model, ["images"], "ray.jsonl", SMALL, rows=rows) == (2000, 1)
        assert killed
    finally:
        cluster.shutdown()
    predict_many(model, ["images"], "here.jsonl", SMALL)
    assert Path("ray.jsonl").read_bytes() == Path("here.jsonl").read_bytes()
