from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import pytest
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.tensors import random_feed
from deploy.errors import BackendError, InputError, SessionClosedError, UsageError
from deploy.runtime.catalog import AUTO
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions


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


def test_a_session_tells_its_inputs_and_outputs(pair_session: Session) -> None:
    assert [str(spec) for spec in pair_session.inputs] == ["x: float32 batchx4", "index: int64 batch"]
    assert [spec.name for spec in pair_session.outputs] == ["y", "total", "same", "anchors"]


def test_calling_a_session_equals_run(session: Session) -> None:
    x = images(3)
    np.testing.assert_array_equal(session(x), session.run({"input": x})["logits"])


def test_calling_a_session_with_several_inputs_is_refused(pair_session: Session) -> None:
    with pytest.raises(InputError, match=r"2 inputs and 4 outputs: use run\(\) with names \(x, index\)"):
        pair_session(np.zeros((1, 4), np.float32))


def test_torch_tensors_give_torch_tensors_of_the_same_values(session: Session) -> None:
    x = images(2)
    result = session(torch.from_numpy(x))
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float32
    assert result.device == torch.device("cpu")
    np.testing.assert_array_equal(result.numpy(), session(x))


def test_a_tensor_that_wants_gradients_is_taken_and_the_result_has_none(session: Session) -> None:
    x = torch.from_numpy(images(1)).requires_grad_()
    assert not session(x).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        lambda x: np.ascontiguousarray(x.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1),
    ],
    ids=["fortran", "strided", "negative", "transposed"],
)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_arrays_that_are_not_contiguous_give_the_same_result(
    shared_lenet5: Artifact, backend: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    x = images(2)
    changed = change(x)
    assert not changed.flags.c_contiguous
    with open_session(shared_lenet5, backend) as session:
        expected = session(x)
        np.testing.assert_allclose(session(changed), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(session(changed), expected, rtol=0, atol=1e-6)  # the checked path as well


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_read_only_arrays_are_taken_and_inputs_never_change(shared_lenet5: Artifact, backend: str) -> None:
    x = images(2)
    before = x.copy()
    frozen = x.copy()
    frozen.setflags(write=False)
    with open_session(shared_lenet5, backend) as session:
        expected = session(x)
        for _ in range(2):
            np.testing.assert_allclose(session(frozen), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_results_belong_to_the_caller(shared_lenet5: Artifact, backend: str) -> None:
    with open_session(shared_lenet5, backend) as session:
        first = session(images(2))
        kept = first.copy()
        second = session(images(2, seed=1))
        np.testing.assert_array_equal(first, kept)
        first += 1  # writable
        assert not np.shares_memory(first, second)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_half_precision_goes_in_and_comes_out_unchanged(half: Artifact, shared_lenet5: Artifact, backend: str) -> None:
    x = images(2)
    with open_session(shared_lenet5, "onnxruntime") as full:
        expected = full(x)
    with open_session(half, backend) as session:
        dtype = np.float32 if backend == "eager" else np.float16  # eager is the FP32 module that it descends from
        result = session(x.astype(dtype))
        as_tensor = session(torch.from_numpy(x.astype(dtype)))
    assert result.dtype == dtype
    assert as_tensor.numpy().dtype == dtype
    np.testing.assert_allclose(result.astype(np.float32), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"missing x: float32 batchx4, index: int64 batch"),
        ({"x": np.zeros((1, 4), np.float32)}, r"missing index: int64 batch"),
        (pair_feed() | {"z": np.zeros(1)}, r"unknown 'z'; expected x: float32 batchx4, index: int64 batch"),
        ({"X": np.zeros((1, 4), np.float32), "index": np.zeros(1, np.int64)}, r"missing x: .*unknown 'X'"),
        (pair_feed() | {"x": np.zeros((2, 4))}, r"'x' is float64; expected x: float32 batchx4"),
        (pair_feed() | {"x": np.zeros((2, 5), np.float32)}, r"'x' has shape 2x5; expected x: float32 batchx4"),
        (pair_feed() | {"x": np.zeros((2, 4, 1), np.float32)}, r"'x' has 3 dimensions 2x4x1"),
        (pair_feed() | {"x": np.zeros((3, 4), np.float32)}, r"'batch' is 2 here and 3 in another input"),
        (pair_feed(1) | {"x": np.zeros((0, 4), np.float32)}, r"'batch' must be 1 or more"),
        (pair_feed() | {"x": [[1.0] * 4] * 2}, r"'x' is a list; expected a numpy array or a torch tensor"),
        (pair_feed() | {"x": torch.zeros(2, 4)}, r"mixes numpy arrays and torch tensors"),
        ({"x": torch.zeros(2, 4), "index": torch.zeros(2)}, r"'index' is float32; expected index: int64 batch"),
    ],
)
def test_wrong_inputs_are_named_with_what_was_expected(pair_session: Session, feed: dict[str, object], message: str) -> None:
    pair_session.run(pair_feed())  # good feeds seen before do not blunt the checks
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            pair_session.run(feed)


def test_a_scalar_input_stays_a_scalar(tmp_path_factory: pytest.TempPathFactory) -> None:
    import onnx

    path = tmp_path_factory.mktemp("scalar") / "scalar.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n] x, float s) => (float[n] y) { y = Mul(x, s) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    for backend in AUTO:
        with open_session(open_onnx(path), backend) as session:
            strided = np.arange(6, dtype=np.float32)[::2]  # makes all inputs contiguous
            result = session.run({"x": strided, "s": np.array(3, np.float32)})["y"]
            np.testing.assert_array_equal(result, [0, 6, 12])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager", "null"])
def test_a_closed_session_refuses_to_run_and_may_be_closed_again(shared_lenet5: Artifact, backend: str) -> None:
    with open_session(shared_lenet5, backend) as session:
        session(images(1))
    session.close()
    with pytest.raises(SessionClosedError, match="the session on 'lenet5' is closed"):
        session(images(1))


def test_warmup_runs_the_optimal_shapes_of_the_profile(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "null") as session:
        assert session.dims() == {"batch": 8}
        shapes: list[tuple[int, ...]] = []
        compute = session._compute
        session._compute = lambda feed: shapes.append(feed["input"].shape) or compute(feed)  # type: ignore[method-assign,func-returns-value]
        session.warmup(runs=2)
        session.warmup({"input": images(5)}, runs=1)
    assert shapes == [(8, 1, 28, 28), (8, 1, 28, 28), (5, 1, 28, 28)]


def test_a_feed_beyond_the_memory_is_an_error_with_its_shape(shared_lenet5: Artifact) -> None:
    def fail(feed: object) -> list[np.ndarray]:
        return [np.zeros((1 << 60,), np.float32)]

    with open_session(shared_lenet5, "null") as session:
        session._compute = fail  # type: ignore[method-assign]
        with pytest.raises(BackendError, match=r"null has no memory to run 'lenet5' on input 3x1x28x28: Unable to allocate"):
            session(images(3))


def test_a_dynamic_dimension_without_a_profile_has_no_size(tmp_path_factory: pytest.TempPathFactory) -> None:
    import onnx

    path = tmp_path_factory.mktemp("dynamic") / "dynamic.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, width] x) => (float[n, width] y) { y = Relu(x) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    message = r"neither a profile nor a crop in the preprocessing gives 'width' a size: pass a feed"
    with open_session(open_onnx(path)) as session, pytest.raises(UsageError, match=message):
        session.warmup()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "gpu"}, "unknown device 'gpu'"), ({"device": "cpu:1"}, "unknown device"), ({"threads": 0}, "`threads` must be 1"),
     ({"compute": "int8"}, "unknown compute precision 'int8'")],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SessionOptions(**options)  # type: ignore[arg-type]


def test_a_thousand_shapes_do_not_pile_up(shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtime.session._SEEN_SHAPES", 10)
    with open_session(shared_lenet5, "null") as session:
        for batch in range(1, 50):
            assert session(images(batch)).shape == (batch, 10)
        assert len(session._seen) <= 10


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_a_feed_in_any_order_and_mapping_is_the_same(pair: Artifact, backend: str) -> None:
    with open_session(pair, backend) as session:
        feed = random_feed(session.inputs, {"batch": 3})
        expected = session.run(feed)
        for other in (dict(reversed(feed.items())), MappingProxyType(feed)):
            for _ in range(2):
                np.testing.assert_array_equal(session.run(other)["total"], expected["total"])
