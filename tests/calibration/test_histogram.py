import math
from fractions import Fraction

import numpy as np
import pytest

from deploy.calibration.histogram import BINS, Histogram, HistogramError, NonFiniteError
from tests.memory import peak_bytes


def of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def assert_same(one: Histogram, other: Histogram) -> None:
    np.testing.assert_array_equal(one.counts, other.counts)
    assert (one.width, one.amax, one.zeros) == (other.width, other.amax, other.zeros)


def reference(values: list[float]) -> tuple[list[int], Fraction]:
    """Counts and bin width, in exact arithmetic."""
    size = Fraction(1)
    amax = max(Fraction(abs(value)) for value in values)
    while size > amax:
        size /= 2
    while size <= amax:
        size *= 2
    counts = [0] * BINS
    for value in values:
        counts[math.floor(Fraction(abs(value)) / size * BINS)] += 1
    return counts, size / BINS


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(count: int, seed: int = 0) -> np.ndarray:
    """Both signs and all magnitudes, with zeros and the smallest and largest float32 among them."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=count) * 10.0 ** rng.uniform(-38, 38, size=count)).astype(np.float32)
    values[:: count // 20] = 0
    values[1:4] = 1e-45, -3.4e38, 1e-30
    return values


@pytest.mark.parametrize(
    "values",
    [
        gaussian(3000),
        np.abs(gaussian(3000)) * np.float32(1e30),
        gaussian(3000) * np.float32(1e-30),
        wide(3000),
        np.array([1, 0.5, 0.25, 2**-12, 2**-13], dtype=np.float32),
        np.array([-6], dtype=np.float32),
        np.nextafter(np.float32([1, 2, 4]), np.float32(0)),
    ],
    ids=["gaussian", "huge", "tiny", "all magnitudes", "powers of two", "one value", "just below powers of two"],
)
def test_counts_are_those_of_exact_arithmetic(values):
    counts, width = reference([float(value) for value in values])
    histogram = of(values)
    assert histogram.counts.dtype == np.int64
    assert histogram.counts.tolist() == counts
    assert Fraction(histogram.width) == width


@pytest.mark.parametrize("parts", [1, 7, 32])
@pytest.mark.parametrize("make", [lambda: gaussian(20_000), lambda: wide(20_000)], ids=["gaussian", "all magnitudes"])
def test_neither_order_nor_batching_matters(make, parts):
    values = make()
    whole = of(values)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.integers(0, len(values) + 1, size=parts - 1))  # some parts may be empty
        assert_same(of(*np.split(rng.permutation(values), cuts)), whole)
    ascending = values[np.argsort(np.abs(values))]
    assert_same(of(*np.array_split(ascending, parts)), whole)
    assert_same(of(*np.array_split(ascending[::-1], parts)), whole)


def test_the_largest_magnitude_is_exact():
    values = gaussian(10_000)
    assert of(values[:5000], values[5000:]).amax == float(np.abs(values).max())
    assert of(np.float32([-3, -2]), np.float32([-7, -1])).amax == 7
    assert of(np.float32([3.3, 2])).amax == float(np.float32(3.3))
    assert of(np.float32([1e-45])).amax == float(np.float32(1e-45))


def test_nothing_and_zeros_have_no_width():
    histogram = of(np.zeros((0, 3), dtype=np.float32))
    assert (histogram.total, histogram.zeros, histogram.width, histogram.amax) == (0, 0, 0.0, 0.0)
    histogram.add(np.float32([0.0, -0.0, 0.0]))
    assert (histogram.total, histogram.zeros, histogram.width, histogram.amax) == (3, 3, 0.0, 0.0)
    assert histogram.counts[0] == 3
    histogram.add(np.float32([5, 1e-30]))
    assert (histogram.total, histogram.zeros, histogram.amax) == (5, 3, 5.0)
    assert histogram.counts[0] == 4


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-36, 2.0**-115, 1e-30, 3.4028235e38])
def test_a_single_value_of_any_magnitude_lies_in_the_bin_that_holds_it(value):
    histogram = of(np.float32([value, -value]))
    (index,) = np.flatnonzero(histogram.counts)
    assert histogram.counts[index] == 2
    assert index * histogram.width <= float(np.float32(value)) < (index + 1) * histogram.width
    assert histogram.zeros == 0
    assert index >= BINS // 2 or value < 2.0**-115


@pytest.mark.parametrize(
    ("bad", "nans", "infinities"), [([np.nan, np.nan], 2, 0), ([np.inf, -np.inf, -np.inf], 0, 3), ([np.nan, np.inf], 1, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite_are_refused_and_counted(bad, nans, infinities, dtype):
    values = gaussian(100_000).astype(dtype)
    values[:: 100_000 // len(bad)][: len(bad)] = bad
    histogram = of(gaussian(10))
    with pytest.raises(NonFiniteError, match=f"^{nans} NaN and {infinities} infinite among 100000 values") as caught:
        histogram.add(values)
    assert (caught.value.nans, caught.value.infinities) == (nans, infinities)
    assert_same(histogram, of(gaussian(10)))


def test_float16_counts_as_the_same_numbers_in_float32():
    half = gaussian(50_000).astype(np.float16)
    assert_same(of(half), of(half.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, bool, ">f4", object])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(HistogramError, match="cannot be counted; expected float32 or float16"):
        of(np.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_layout_of_the_array_does_not_matter(dtype):
    values = gaussian(4, 6, 50, 70).astype(dtype)
    whole = of(values)
    assert_same(of(values.transpose(0, 2, 3, 1)), whole)
    assert_same(of(np.asfortranarray(values)), whole)
    assert_same(of(values[::-1, :, ::-1]), whole)
    assert_same(of(values[..., ::2], values[..., 1::2]), whole)
    assert_same(of(*values.reshape(-1, 1)[:, 0].reshape(4, -1)), whole)
    assert_same(of(np.broadcast_to(values[:1, :1, :1], (3, 2, 5, 70))), of(*[values[0, 0, 0]] * 30))
    assert_same(of(np.array(2.5, dtype=dtype)), of(np.array([[2.5]], dtype=dtype)))


def test_the_array_that_was_counted_is_left_as_it_was():
    values = gaussian(1000)
    values.flags.writeable = False
    of(values)
    np.testing.assert_array_equal(values, gaussian(1000))


@pytest.mark.parametrize("view", ["", ".T", "[:, ::2]"], ids=["plain", "transposed", "strided"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_does_not_grow_with_the_array(view, dtype):
    def peak(rows: int) -> int:
        return peak_bytes(
            "histogram.add(values)",
            before=f"""
            import numpy as np
            from deploy.calibration.histogram import Histogram
            values = np.ones(({rows}, 1000), np.{dtype}){view}
            histogram = Histogram()
            """,
        )

    small, large = peak(300), peak(3000)
    assert large < small + 100_000
    assert large < 6_000_000
