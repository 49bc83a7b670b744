"""The random inputs that sessions are timed on."""

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.runtime.worker import feeds
from deploy.runtime.worker.feeds import random_inputs, total_bytes


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "cache_bytes", lambda: 1 << 20)


def test_random_inputs_are_larger_than_the_cache_and_the_same_every_time(shared_lenet5: Artifact) -> None:
    specs = tuple(shared_lenet5.manifest.inputs)
    feeds = random_inputs(specs, {"batch": 8})
    assert total_bytes(feeds) >= 2 << 20
    assert all(feed["input"].shape == (8, 1, 28, 28) and feed["input"].flags.c_contiguous for feed in feeds)
    assert all(0.8 < feed["input"].std() < 1.2 for feed in feeds)  # never zeros
    again = random_inputs(specs, {"batch": 8})
    assert all(np.array_equal(a["input"], b["input"]) for a, b in zip(feeds, again, strict=True))


def test_there_are_two_at_least_and_not_too_many(shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = tuple(shared_lenet5.manifest.inputs)
    assert len(random_inputs(specs, {"batch": 4000})) == 2
    monkeypatch.setattr(feeds, "MOST", 5)
    assert len(random_inputs(specs, {"batch": 1})) == 5
