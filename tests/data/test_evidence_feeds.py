"""Feeds of real data and made-up ones: their batches, their sizes and their numbers."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.preprocess import Preprocess
from deploy.data.evidence_feeds import folder_digest, parity_feeds, range_feeds, real_data
from deploy.progress import silent

ANY_BATCH = "g (float[n, 1, 8, 8] x) => (float[n, 1, 8, 8] y) { y = Neg(x) }"


def artifact_of(tmp_path: Path, text: str, preprocess: Preprocess | None = None) -> Artifact:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'), tmp_path / "net.onnx")
    bare = open_artifact(tmp_path / "net.onnx")
    return Artifact(bare.path, msgspec.structs.replace(bare.manifest, preprocess=preprocess), bare.bare)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_a_dynamic_batch_is_tried_at_three_sizes(tmp_path: Path, images: Path) -> None:
    artifact = artifact_of(tmp_path, ANY_BATCH, Preprocess(channels=1))
    for data, kind in ((None, "random"), (real_data(artifact, images), "images")):
        feeds = parity_feeds(artifact, data)
        assert [(each.data, len(each.feed["x"]), each.maybe) for each in feeds] == [(kind, size, False) for size in (1, 2, 5)]


def test_a_fixed_batch_stays(tmp_path: Path, images: Path) -> None:
    artifact = artifact_of(tmp_path, ANY_BATCH.replace("n, 1", "3, 1"), Preprocess(channels=1))
    assert [len(each.feed["x"]) for each in parity_feeds(artifact, None)] == [3, 3, 3]
    assert {len(each.feed["x"]) for each in parity_feeds(artifact, real_data(artifact, images))} == {3}


def test_dynamic_sizes_are_tried_at_odd_ones_too(tmp_path: Path) -> None:
    artifact = artifact_of(tmp_path, "g (float[n, 3, H, W] x) => (float[n, 3, H, W] y) { y = Neg(x) }")
    *first, odd, even = parity_feeds(artifact, None)
    assert {each.feed["x"].shape[2:] for each in first} == {(224, 192)}
    assert odd.maybe
    assert even.maybe
    assert all(size % 2 == 1 for size in odd.feed["x"].shape[2:])
    assert even.feed["x"].shape[2:] == (256, 224), "for networks that take multiples of 32 only"
    (tmp_path / "feeds").mkdir()
    for index in range(2):
        np.savez(tmp_path / "feeds" / f"{index}.npz", x=np.ones((2, 3, 32, 48), np.float32))
    *real, cut = parity_feeds(artifact, real_data(artifact, tmp_path / "feeds"))
    assert {each.data for each in real} == {"feeds"}
    assert cut.maybe
    assert cut.feed["x"].shape[2:] == (21, 31)


def test_ranges_are_read_from_all_of_the_data(tmp_path: Path, images: Path) -> None:
    artifact = artifact_of(tmp_path, ANY_BATCH, Preprocess(channels=1))
    assert sum(len(feed["x"]) for feed in range_feeds(artifact, real_data(artifact, images), None, silent)) == 8
    assert sum(len(feed["x"]) for feed in range_feeds(artifact, None, None, silent)) == 8


def test_made_up_integers_are_rows_of_the_tables_that_they_look_up_and_masks_are_0_or_1(tmp_path: Path) -> None:
    words = ", ".join(["1"] * 200)
    artifact = artifact_of(
        tmp_path,
        f"""g (int64[n, 6] ids, int64[n, 6] kinds, int64[n, 6] attention_mask) => (float[n, 6, 2] y)
        <float[100, 2] words = {{{words}}}, float[2, 2] table = {{1, 2, 3, 4}}> {{
            a = Gather(words, ids) t = Identity(kinds) b = Gather(table, t) m = Cast<to = 1>(attention_mask)
            axes = Constant<value = int64[1] {{2}}>() u = Unsqueeze(m, axes) s = Add(a, b) y = Mul(s, u) }}""",
    )
    assert {spec.name: spec.bounds for spec in artifact.manifest.inputs} == {
        "ids": (0, 100),
        "kinds": (0, 2),
        "attention_mask": None,
    }
    feeds = [each.feed for each in parity_feeds(artifact, None)]
    assert max(feed["ids"].max() for feed in feeds) > 9
    assert {int(number) for feed in feeds for number in feed["kinds"].ravel()} == {0, 1}
    assert {int(number) for feed in feeds for number in feed["attention_mask"].ravel()} == {0, 1}
    assert all((feed["attention_mask"][:, 0] == 1).all() for feed in feeds)


def test_the_digest_follows_the_files(tmp_path: Path, images: Path) -> None:
    (tmp_path / "feeds").mkdir()
    np.savez(tmp_path / "feeds" / "0.npz", x=np.ones(3))
    first = folder_digest(tmp_path / "feeds", 8)
    np.savez(tmp_path / "feeds" / "0.npz", x=np.zeros(3))
    assert folder_digest(tmp_path / "feeds", 8) != first
    assert folder_digest(images, 2) != folder_digest(images, 3)
