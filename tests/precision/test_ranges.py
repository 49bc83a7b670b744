import weakref

import numpy as np
import pytest

from deploy.errors import PrecisionError
from deploy.precision.ranges import Range, activation_ranges
from tests.precision.conftest import prepared


def feeds(*arrays):
    return [{"x": np.array(array, dtype=np.float32)} for array in arrays]


def test_ranges_are_the_extremes_over_all_feeds_of_inputs_and_activations(parse):
    model = prepared(parse("g (float[N] x) => (float[N] y) { a = Mul(x, x) b = Sub(a, x) y = Relu(b) }"))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size, dtype=np.float32) for size in (3, 1, 50)]
    found = activation_ranges(model, feeds(*arrays))
    x = np.concatenate(arrays)
    expected = {"x": x, "a": x * x, "b": x * x - x, "y": np.maximum(x * x - x, 0)}
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert (found[name].low, found[name].high) == pytest.approx((values.min(), values.max()), rel=1e-6), name
        assert found[name].amax == pytest.approx(np.abs(values).max(), rel=1e-6)
        assert found[name].finite


def test_integers_and_the_inside_of_subgraphs_have_no_ranges(parse):
    model = prepared(
        parse(
            """g (float[N] x, int64[N] i, bool c) => (float[N] y, int64[N] j) { j = Add(i, i)
            y = If(c) <then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b = Neg(x) }> }"""
        )
    )
    feed = {"x": np.array([-1, 2], dtype=np.float32), "i": np.array([1, 2]), "c": np.array(True)}
    assert activation_ranges(model, [feed]) == {"x": Range(low=-1, high=2), "y": Range(low=0, high=2)}


@pytest.mark.parametrize("place", [0, 1, 40])
def test_a_nan_is_noticed_wherever_it_stands(parse, place):
    model = prepared(parse("g (float[N] x) => (float[N] y) { a = Sqrt(x) y = Relu(x) }"))
    x = np.linspace(1, 4, 64, dtype=np.float32)
    x[place] = -1
    found = activation_ranges(model, feeds(x, [1.0]))
    assert found["a"].nan
    assert not found["a"].finite
    assert found["x"].finite


def test_an_infinity_of_both_signs_is_no_nan_and_the_finite_end_counts(parse):
    model = prepared(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"))
    assert not activation_ranges(model, feeds([np.inf, -np.inf, 1]))["y"].nan
    mask = activation_ranges(model, feeds([np.inf, -5, 1]))["y"]
    assert (mask.low, mask.high, mask.amax, mask.finite) == (-np.inf, 5, 5, False)


def test_empty_tensors_have_no_range(parse):
    model = prepared(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"))
    assert activation_ranges(model, feeds([])) == {}
    assert activation_ranges(model, feeds([], [2])) == {"x": Range(low=2, high=2), "y": Range(low=-2, high=-2)}


def test_feeds_are_taken_one_at_a_time_and_let_go(parse):
    model = prepared(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"))
    alive = []

    def stream():
        for _ in range(6):
            array = np.ones(1000, dtype=np.float32)
            alive.append(weakref.ref(array))
            yield {"x": array}
            del array
            assert sum(reference() is not None for reference in alive) <= 1

    activation_ranges(model, stream())
    assert len(alive) == 6


def test_a_feed_that_does_not_fit_is_an_error(parse):
    model = prepared(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }"))
    with pytest.raises(PrecisionError, match="cannot run the graph"):
        activation_ranges(model, feeds([1, 2, 3]))


def test_memory_is_that_of_one_activation_and_not_of_all(parse):
    """ONNX Runtime by default measures the tensors when all of them are there."""
    chain = " ".join(f"x{i} = {'Sin' if i % 2 else 'Cos'}(x{i - 1})" for i in range(1, 40))
    model = prepared(parse(f"g (float[N] x0) => (float[N] x39) {{ {chain} }}"))
    feed = {"x0": np.zeros(1_000_000, np.float32)}
    activation_ranges(model, [{"x0": feed["x0"][:1]}])  # what is loaded once is there
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    before = peak()
    activation_ranges(model, [feed])
    assert peak() - before < 10 * feed["x0"].nbytes


def peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
