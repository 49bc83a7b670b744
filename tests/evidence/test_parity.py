import json
import math

import ml_dtypes
import msgspec
import numpy as np
import pytest

from deploy.errors import ParityError, UsageError
from deploy.evidence.parity import (
    TOLERANCES,
    Difference,
    Parity,
    ParityCase,
    Tolerance,
    compare,
    constant_outputs,
    difference,
    judge,
    tiny_outputs,
)

INF, NAN = float("inf"), float("nan")
LOOSE = Tolerance(rtol=0.1, atol=0.01)


def check(actual, expected, tolerance=LOOSE):
    return compare(
        {"y": np.asarray(actual, dtype=np.float32)}, {"y": np.asarray(expected, dtype=np.float32)}, tolerance,
        data="random", batch=2, what="build/net",
    )  # fmt: skip


def test_difference_gives_absolute_relative_and_cosine():
    found = difference(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 4.0]))
    assert found.max_abs == 2
    assert found.max_rel == 0.5
    assert found.cosine == pytest.approx(13 / (3 * 21**0.5))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool", ml_dtypes.bfloat16])
def test_equal_arrays_do_not_differ(dtype):
    values = np.array([[0, 1], [1, 3]]).astype(dtype)
    found = difference(values, values)
    assert (found.max_abs, found.max_rel) == (0, 0)
    assert found.cosine == pytest.approx(1)


def test_large_halves_are_compared_without_overflow():
    assert difference(np.float16([-60000]), np.float16([60000])).max_abs == 120000


@pytest.mark.parametrize(
    ("actual", "expected", "result"),
    [
        ([0, 0], [0, 0], Difference(max_abs=0, max_rel=0, cosine=1)),
        ([0, 1], [0, 0], Difference(max_abs=1, max_rel=1, cosine=0)),
        ([0, 0], [0, 2], Difference(max_abs=2, max_rel=1, cosine=0, sqnr_db=0)),
        ([], [], Difference(max_abs=0, max_rel=0, cosine=1)),
        ([INF, NAN], [INF, NAN], Difference(max_abs=0, max_rel=0, cosine=1)),
        ([INF, 1], [-INF, 1], Difference(max_abs=INF, max_rel=INF, cosine=0)),
        ([1, 1], [NAN, 1], Difference(max_abs=INF, max_rel=INF, cosine=0)),
        ([NAN, 1], [1, 1], Difference(max_abs=INF, max_rel=INF, cosine=0)),
        ([INF, 3], [INF, 4], Difference(max_abs=1, max_rel=0.25, cosine=1, sqnr_db=20 * math.log10(4))),
    ],
)
def test_zeros_and_what_is_not_finite_are_told_apart(actual, expected, result):
    assert difference(np.array(actual, dtype=np.float32), np.array(expected, dtype=np.float32)) == result


def test_the_limit_is_a_share_of_the_largest_magnitude_plus_the_absolute_tolerance():
    check([0.5, 10.0], [0.0, 10.0])  # far off by its own element, within a tenth of the largest
    check([1.0, -10.0], [0.0, -10.0])
    with pytest.raises(ParityError) as caught:
        check([1.0105, 10.0], [0.0, 10.0])
    message = str(caught.value)
    assert message.startswith("build/net: output 'y' is off by 1.01 at batch 2 on random input; at most 1.01 is allowed")
    assert "`rtol` 0.1 of 10, `atol` 0.01; cosine 0.99" in message


@pytest.mark.parametrize("broken", [INF, -INF, NAN])
def test_what_is_not_finite_never_passes_for_a_finite_reference(broken):
    with pytest.raises(ParityError, match="off by inf"):
        check([broken, 1.0], [1e30, 1.0])


def test_an_infinity_in_the_reference_does_not_widen_the_limit():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        reference = np.array([INF, 1.0]).astype(dtype)
        with pytest.raises(ParityError, match="off by 4"):
            compare({"y": np.array([INF, 5.0]).astype(dtype)}, {"y": reference}, LOOSE, data="random", batch=1, what="net")


def test_another_shape_is_refused():
    with pytest.raises(ParityError, match=r"output 'y' has shape \(1, 2\) at batch 2; the reference has \(2,\)"):
        check([[1, 2]], [1, 2])


def test_other_outputs_are_refused():
    x = np.zeros(1)
    with pytest.raises(ParityError, match="net: the outputs are a, b; those of the reference are a, c"):
        compare({"a": x, "b": x}, {"a": x, "c": x}, LOOSE, data="random", batch=1, what="net")


def test_a_case_holds_the_differences_of_all_outputs():
    feed = {"a": np.ones(3), "b": np.zeros(2)}
    case = compare(feed, feed, LOOSE, data="images", batch=3, what="net")
    assert (case.data, case.batch, list(case.outputs)) == ("images", 3, ["a", "b"])


def test_worst_is_over_all_cases_and_outputs():
    first = {"a": Difference(max_abs=1, max_rel=0.1, cosine=0.5), "b": Difference(max_abs=0, max_rel=0, cosine=1)}
    second = {"a": Difference(max_abs=0, max_rel=0.3, cosine=0.9)}
    cases = [ParityCase(data="random", batch=1, outputs=first), ParityCase(data="random", batch=2, outputs=second)]
    parity = Parity(against="eager", by="onnxruntime", tolerance=TOLERANCES["fp32"], cases=cases)
    assert parity.worst == Difference(max_abs=1, max_rel=0.3, cosine=0.5)
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(parity))), Parity) == parity


@pytest.mark.parametrize(("rtol", "atol"), [(-1, 0), (0, -1e-9), (NAN, 0)])
def test_negative_tolerances_are_refused(rtol, atol):
    with pytest.raises(UsageError, match="0 or more"):
        Tolerance(rtol=rtol, atol=atol)


def test_tolerances_grow_with_the_loss_of_bits():
    assert TOLERANCES["fp32"].rtol < TOLERANCES["fp16"].rtol < TOLERANCES["bf16"].rtol


WHOLE = Tolerance(rtol=0.01, atol=0.0, min_cosine=0.9, min_sqnr=10.0, min_agreement=0.9)


def within(actual, expected, tolerance=WHOLE):
    return not judge({"y": np.asarray(actual)}, {"y": np.asarray(expected)}, tolerance, data="random", batch=1)[1]


@pytest.mark.parametrize("shape", [(1, 4, 50), (2, 8, 8, 3)])
def test_one_pixel_of_a_map_does_not_decide_and_one_score_does(shape):
    expected = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    actual = expected.copy()
    actual.flat[3] += 0.5
    assert within(actual, expected)
    assert not within(actual.ravel()[None], expected.ravel()[None])
    assert not within(expected * np.float32(0.5), expected), "a map that is half as large is off by 6 dB"


def test_probabilities_are_held_to_the_whole():
    expected = np.array([[0.1, 0.2, 0.7]], np.float32)
    assert within([[0.12, 0.2, 0.68]], expected)
    assert not within([[0.7, 0.2, 0.1]], expected)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_are_held_to_the_share_that_agrees(dtype):
    expected = np.arange(100) % 2
    for wrong, fits in ((5, True), (10, True), (11, False)):
        actual = np.where(np.arange(100) < wrong, 1 - expected, expected)
        assert within(actual.astype(dtype), expected.astype(dtype)) is fits
    assert not within(np.array([1]).astype(dtype), np.array([0]).astype(dtype), TOLERANCES["fp32"]), "one class in FP32"


def test_outputs_that_no_comparison_can_fail_are_found():
    varied, same = np.array([[1.0, 2.0]]), np.zeros((1, 2))
    assert constant_outputs([{"a": varied, "b": same}, {"a": varied, "b": same}]) == ["b"]
    assert constant_outputs([{"a": same}, {"a": same + 1}]) == []
    assert constant_outputs([{"a": np.ones(1)}]) == []  # one number may be the same by chance


@pytest.mark.parametrize(
    ("precision", "scale", "actual", "tiny"),
    [
        ("fp32", 1e-13, 0.0, True),  # zeros agree as well
        ("fp32", 1e-6, 0.9, True),
        ("fp32", 1e-13, 1.00001, False),  # it agrees by `rtol` too
        ("fp32", 1.0, 1.00001, False),
        ("fp16", 1e-9, 0.0, True),
        ("fp16", 1e-5, 1.01, False),  # it has a cosine and a signal to noise
    ],
)
def test_outputs_that_agree_for_atol_alone_are_found(precision: str, scale: float, actual: float, tiny: bool) -> None:
    expected = {"y": np.array([[1.0, -0.5]]) * scale, "n": np.arange(2)}
    case, wrong = judge({**expected, "y": expected["y"] * actual}, expected, TOLERANCES[precision], data="random", batch=1)
    assert wrong == ""
    assert tiny_outputs([expected], [case], TOLERANCES[precision]) == ["y"] * tiny
