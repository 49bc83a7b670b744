"""The sorts of arrays that go in and out, and arrays of the caller's that results are written to."""

import numpy as np
import pytest
import torch

from deploy.artifact.artifact import Artifact
from deploy.errors import InputError
from deploy.runtime.arrays import sort_of, writable
from deploy.runtime.load import open_session
from deploy.runtime.session import Session


@pytest.fixture(scope="module")
def session(shared_lenet5: Artifact) -> Session:
    return open_session(shared_lenet5, "onnxruntime")


@pytest.fixture(scope="module")
def pair_session(pair: Artifact) -> Session:
    return open_session(pair, "onnxruntime")


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 1, 28, 28), dtype=np.float32)


def pair_feed(batch: int = 2) -> dict[str, np.ndarray]:
    return {
        "x": np.random.default_rng(batch).standard_normal((batch, 4), dtype=np.float32),
        "index": np.arange(batch, dtype=np.int64),
    }


def test_out_is_written_and_returned(pair_session: Session) -> None:
    expected = pair_session.run(pair_feed())
    out = {"y": np.full((2, 3), np.nan, np.float32)}
    results = pair_session.run(pair_feed(), out=out)
    assert results["y"] is out["y"]
    np.testing.assert_array_equal(out["y"], expected["y"])
    np.testing.assert_array_equal(results["total"], expected["total"])


def test_out_takes_torch_tensors(session: Session) -> None:
    x = torch.from_numpy(images(2))
    out = torch.full((2, 10), float("nan"))
    assert session.run({"input": x}, out={"logits": out})["logits"] is out
    torch.testing.assert_close(out, session(x))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ({"nope": np.zeros(1)}, r"unknown output 'nope' in out; expected one of y, total, same, anchors"),
        ({"y": np.zeros((3, 3), np.float32)}, r"out\['y'\] is ndarray float32 3x3; expected ndarray float32 2x3"),
        ({"y": np.zeros((2, 3))}, r"out\['y'\] is ndarray float64 2x3"),
        ({"y": torch.zeros(2, 3)}, r"out\['y'\] is Tensor torch.float32 2x3; expected ndarray"),
        ({"y": [0.0]}, r"out\['y'\] is list; expected ndarray"),
        ({"y": np.broadcast_to(np.zeros((1, 3), np.float32), (2, 3))}, r"out\['y'\] is read-only"),
    ],
)
def test_an_out_that_does_not_fit_is_refused_and_no_other_is_written(
    pair_session: Session, out: dict[str, object], message: str
) -> None:
    total = np.full(2, -1.0, np.float32)
    with pytest.raises(InputError, match=message):
        pair_session.run(pair_feed(), out={"total": total, **out})
    np.testing.assert_array_equal(total, [-1, -1])


class OnGpu:
    """An array of another library in device memory, by DLPack; `kind` is that of dlpack.h."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


def test_the_sort_of_an_input_is_told_from_the_object() -> None:
    assert sort_of("x", np.zeros(1), device_arrays=False) == "numpy"
    assert sort_of("x", torch.zeros(1), device_arrays=True) == "torch"
    assert sort_of("x", OnGpu(2), device_arrays=True) == "device"
    for x, device_arrays, expected in (
        (OnGpu(2), False, "'x' is an OnGpu; expected a numpy array or a torch tensor$"),
        (OnGpu(1), True, "'x' is an OnGpu; expected a numpy array or a torch tensor, or an array on the GPU"),
        ([0.0], False, "'x' is a list"),
    ):
        with pytest.raises(InputError, match=expected):
            sort_of("x", x, device_arrays=device_arrays)


def test_what_torch_cannot_share_is_copied() -> None:
    x = np.zeros((2, 3), np.float32)
    frozen = x.copy()
    frozen.setflags(write=False)
    assert writable(x) is x
    for other in (frozen, x.T, x[:, ::2]):
        copy = writable(other)
        assert copy.flags.writeable
        np.testing.assert_array_equal(copy, other)
        assert not np.shares_memory(copy, other)
