"""The inputs that candidates are timed on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.bench.candidate.inputs import make_feeds
from deploy.errors import DataError
from deploy.runtime.worker import feeds


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "cache_bytes", lambda: 1 << 20)


def test_a_fixed_batch_has_inputs_of_its_own_size(fixed: Artifact) -> None:
    feeds = make_feeds(fixed, tuple(fixed.manifest.inputs), {}, None)
    assert 2 <= len(feeds) <= 64
    assert {feed["input"].shape for feed in feeds} == {(1, 1, 28, 28)}
    assert not np.array_equal(feeds[0]["input"], feeds[1]["input"])


def test_images_are_fed_as_the_model_takes_them(tmp_path: Path) -> None:
    artifact = deploy.export(tmp_path / "net", arch="lenet5")
    for index in range(6):
        path = tmp_path / "images" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((28, 28), 40 * index, np.uint8)).save(path)
    specs = tuple(artifact.manifest.inputs)
    feeds = make_feeds(artifact, specs, {"batch": 3}, tmp_path / "images")
    assert {feed["input"].shape for feed in feeds} == {(3, 1, 28, 28)}
    assert len(feeds) == 2
    with pytest.raises(DataError, match="holds too few images for a batch of 7"):
        make_feeds(artifact, specs, {"batch": 7}, tmp_path / "images")
