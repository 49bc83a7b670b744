import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.candidate.worker import CandidateWorker
from deploy.errors import BackendError


@pytest.fixture
def mine(shared_lenet5: Artifact) -> CandidateWorker:
    opened = CandidateWorker()
    opened.handle({"artifact": str(shared_lenet5.path), "backend": "null", "options": {"device": "cpu"}})
    return opened


def test_the_feed_has_the_sizes_asked_for(mine: CandidateWorker) -> None:
    mine.handle({"do": "prepare", "dims": {"batch": 5}, "outputs": None, "data": None})
    first, second = next(mine._feeds), next(mine._feeds)
    assert first["input"].shape == second["input"].shape == (5, 1, 28, 28)
    assert not np.array_equal(first["input"], second["input"])


def test_a_batch_beyond_the_memory_is_an_error_with_its_size(mine: CandidateWorker) -> None:
    with pytest.raises(BackendError, match=r"no memory for an input with batch 1000000000000: Unable to allocate 2.79 PiB"):
        mine.handle({"do": "prepare", "dims": {"batch": 10**12}, "outputs": None, "data": None})
