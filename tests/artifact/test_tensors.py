import json

import msgspec
import numpy as np
import pytest

from deploy.artifact.tensors import (
    DTYPES,
    ShapeRange,
    TensorSpec,
    batch_dim,
    batch_range,
    default_dims,
    default_profile,
    format_shape,
    format_specs,
    parse_fixed_shapes,
    parse_shape,
    parse_shapes,
    random_feed,
    row_count,
    rows_join,
    slice_rows,
)
from deploy.errors import DeployError, InputError, UsageError


def spec(name="x", shape=("N", 3, "H", "W"), dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("1x3x224x224", (1, 3, 224, 224)), ("Nx3xHxW", ("N", 3, "H", "W")), ("7", (7,)), ("1xbatch_2", (1, "batch_2"))],
)
def test_shapes_are_read_and_written(text, shape):
    assert parse_shape(text) == shape
    assert format_shape(shape) == text


@pytest.mark.parametrize("text", ["", "1x", "0x3", "-1x3", "1x3.5", "1,3", "1x3x2N"])
def test_a_shape_that_cannot_be_read_is_named(text):
    with pytest.raises(UsageError, match="cannot read the shape"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "counts", "expected"),
    [
        ("x=1x3", (1,), ("x", ((1, 3),))),
        ("x=NxH", (1,), ("x", (("N", "H"),))),
        ("a:0=1:2:3", (1, 3), ("a:0", ((1,), (2,), (3,)))),
        ("x=4", (1, 3), ("x", ((4,),))),
    ],
)
def test_shapes_with_a_name_are_read(text, counts, expected):
    assert parse_shapes(text, what="it", expected="NAME=SHAPE", counts=counts) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "cannot read `shapes` 'x'; expected NAME=SHAPE"),
        ("=1x2", "cannot read `shapes` '=1x2'; expected NAME=SHAPE"),
        ("x=", "cannot read `shapes` 'x='; expected NAME=SHAPE"),
        ("x=1:2", "cannot read `shapes` 'x=1:2'; expected NAME=SHAPE"),
        ("x=1x0", "cannot read the shape '1x0': '0' is neither a positive number nor a name"),
        ("x=1xH", "`shapes` 'x=1xH' must be numbers; expected NAME=SHAPE"),
    ],
)
def test_shapes_that_cannot_be_read_are_refused_in_the_words_of_the_option(text, message):
    with pytest.raises(UsageError) as caught:
        parse_fixed_shapes(text, what="`shapes`", expected="NAME=SHAPE")
    assert str(caught.value) == message


def test_a_scalar_has_a_shape_in_words():
    assert str(spec(shape=())) == "x: float32 scalar"


def test_a_spec_is_checked_when_made():
    with pytest.raises(UsageError, match="'x' has dtype 'float33'; expected one of float32, float16"):
        spec(dtype="float33")
    with pytest.raises(UsageError, match="'x' has a dimension of 0 in Nx0"):
        spec(shape=("N", 0))


def test_symbolic_dimensions_are_named_once_in_order():
    assert spec(shape=("N", "H", 3, "N")).dynamic == ("N", "H")


def test_check_takes_what_fits_and_notes_sizes():
    dims = {}
    spec().check("float32", (2, 3, 10, 20), dims)
    assert dims == {"N": 2, "H": 10, "W": 20}


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("float64", (1, 3, 2, 2), "'x' is float64; expected x: float32 Nx3xHxW"),
        ("float32", (3, 2, 2), "'x' has 3 dimensions 3x2x2; expected x: float32 Nx3xHxW"),
        ("float32", (1, 4, 2, 2), "'x' has shape 1x4x2x2; expected x: float32 Nx3xHxW"),
        ("float32", (0, 3, 2, 2), "'x' has shape 0x3x2x2: 'N' must be 1 or more"),
        ("float32", (5, 3, 2, 2), "'x' has shape 5x3x2x2: 'N' is 5 here and 4 in another input"),
    ],
)
def test_check_says_what_was_expected(dtype, shape, message):
    with pytest.raises(InputError) as caught:
        spec().check(dtype, shape, {"N": 4} if shape[0] == 5 else {})
    assert str(caught.value) == message


def test_a_dimension_must_agree_within_one_tensor_too():
    with pytest.raises(InputError, match="'S' is 3 here and 2"):
        spec(shape=("S", "S")).check("float32", (2, 3), {})


def test_concrete_needs_every_dimension():
    assert spec().concrete({"N": 2, "H": 4, "W": 5, "other": 1}) == (2, 3, 4, 5)
    with pytest.raises(UsageError, match="x: float32 Nx3xHxW needs a size for 'H', 'W'"):
        spec().concrete({"N": 2})


def test_the_batch_is_the_first_symbolic_first_dimension():
    assert batch_dim([spec(shape=(1, "H")), spec(shape=("B", 2))]) == "B"
    assert batch_dim([spec(shape=(1, "H")), spec(shape=())]) is None


@pytest.mark.parametrize(
    ("shapes", "batch", "by_rows"),
    [
        ([("T", "N", 6)], "N", False),
        ([("time", "batch", 6), (1, "batch", 8)], "batch", False),
        ([("T", "batch_size", 6)], "batch_size", False),
        ([("B", "N", 3)], "B", True),  # N points
        ([("batch", "N", 3)], "batch", True),
        ([("rows", "cols")], "rows", True),
        ([(1, "N", 3)], None, False),
    ],
)
def test_a_dimension_called_like_a_batch_is_the_batch_before_another_that_is_first(shapes, batch, by_rows):
    specs = [spec(shape=shape) for shape in shapes]
    assert batch_dim(specs) == batch
    assert rows_join(specs, specs) is by_rows


def test_a_first_dimension_that_is_not_the_batch_has_no_size_of_its_own():
    specs = [spec(shape=("T", "N", 6))]
    assert default_dims(specs, [], known={"T": 7}, remedy="say it") == {"T": 7, "N": 1}
    with pytest.raises(UsageError, match="gives 'T' a size: say it"):
        default_dims(specs, [], known={}, remedy="say it")


def test_the_range_of_the_batch_is_that_of_the_first_input_that_has_it_in_the_profile():
    specs = [spec("mask", (1, 7)), spec("x", ("T", "N", 3)), spec("y", ("N", 2))]
    profile = {
        "x": ShapeRange(min=(5, 2, 3), opt=(5, 4, 3), max=(9, 8, 3)),
        "y": ShapeRange(min=(2, 2), opt=(4, 2), max=(8, 2)),
    }
    assert batch_range(specs, profile) == (2, 8)
    assert batch_range(specs[::2], {"y": profile["y"]}) == (2, 8)
    assert batch_range(specs, {}) is None
    assert batch_range([spec("x", (4, 3))], {"x": ShapeRange(min=(4, 3), opt=(4, 3), max=(4, 3))}) is None


def test_the_default_profile_ranges_over_the_batch():
    profile = default_profile([spec("a", ("N", 3)), spec("b", (5,))])
    assert profile == {
        "a": ShapeRange(min=(1, 3), opt=(8, 3), max=(32, 3)),
        "b": ShapeRange(min=(5,), opt=(5,), max=(5,)),
    }
    assert str(profile["a"]) == "1x3:8x3:32x3"


def test_there_is_no_default_profile_for_other_symbolic_dimensions():
    assert default_profile([spec()]) is None
    assert default_profile([spec("a", ("N", 3)), spec("b", (1, "M"))]) is None


def test_a_static_model_has_a_profile_of_one_shape():
    assert default_profile([spec(shape=(2, 3))]) == {"x": ShapeRange(min=(2, 3), opt=(2, 3), max=(2, 3))}


@pytest.mark.parametrize(
    "shapes", [((2, 3), (1, 3), (4, 3)), ((1, 3), (4, 3), (2, 3)), ((0, 3), (1, 3), (2, 3)), ((1,), (1, 2), (1, 2))]
)
def test_a_range_must_rise(shapes):
    low, best, high = shapes
    with pytest.raises(UsageError, match=format_shape(best)):
        ShapeRange(min=low, opt=best, max=high)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_feeds_fit_their_spec_and_repeat(dtype):
    one = spec("a", ("N", 50), dtype)
    feed = random_feed([one], {"N": 4})
    again, other = random_feed([one], {"N": 4}), random_feed([one], {"N": 4}, seed=1)
    if dtype == "bfloat16":
        assert feed["a"].dtype == np.float32
    else:
        one.check(str(feed["a"].dtype), feed["a"].shape, {})
    assert len(np.unique(feed["a"])) > 1
    np.testing.assert_array_equal(feed["a"], again["a"])
    assert not np.array_equal(feed["a"], other["a"])


def test_random_feeds_need_every_dimension():
    with pytest.raises(UsageError, match="needs a size for 'N'"):
        random_feed([spec(shape=("N", 2))], {})


def test_specs_and_profiles_come_back_from_json_as_they_were():
    profile = default_profile([spec(shape=("N", 2))])
    assert profile is not None
    for value, kind in ((spec(), TensorSpec), (profile["x"], ShapeRange)):
        assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(value))), kind) == value


POOLED = "floor(floor(floor(H/2 - 1/2)/2)/2) + 1"
WIDE = POOLED.replace("H", "W")


def test_a_long_expression_is_shown_as_a_letter() -> None:
    shape = ("batch", 19, POOLED, WIDE, POOLED)
    assert format_shape(shape) == "batchx19xAxBxA"
    assert str(TensorSpec(name="y", dtype="float32", shape=shape)) == "y: float32 batchx19xAxBxA"


@pytest.mark.parametrize("dim", ["H", "H - 2", "2*batch", "a_name_that_is_longer_than_most_names_are"])
def test_a_name_and_a_short_expression_are_shown_as_they_are(dim: str) -> None:
    assert format_shape((1, dim)) == f"1x{dim}"


@pytest.mark.parametrize(
    ("others", "letter"),
    [((), "A"), (("A",), "B"), (("A", "B"), "C"), (("A - 2", 3), "B"), (tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "A1")],
)
def test_a_letter_is_no_name_of_another_dimension(others: tuple[int | str, ...], letter: str) -> None:
    assert format_shape((*others, POOLED)).split("x")[-1] == letter


def test_several_tensors_share_their_letters() -> None:
    specs = [
        TensorSpec(name=name, dtype="float32", shape=shape)
        for name, shape in (("x", (1, "A")), ("y", (WIDE, "H")), ("z", (POOLED, WIDE)))
    ]
    assert format_specs(specs) == "x: float32 1xA, y: float32 BxH, z: float32 CxB"


def test_errors_show_letters_too() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(POOLED, POOLED))
    for call in (lambda: spec.check("float32", (2, 3), {}), lambda: spec.check("float32", (0, 0), {}), lambda: spec.concrete({})):
        with pytest.raises(DeployError) as caught:
            call()
        assert "'A'" in str(caught.value)
        assert "floor" not in str(caught.value)


def test_rows_are_counted_and_cut() -> None:
    feed = {"x": np.arange(12).reshape(6, 2), "y": np.arange(6)}
    assert row_count(feed) == 6
    assert row_count({"x": np.array(3.0)}) == 1
    cut = slice_rows(feed, 4, 9)
    np.testing.assert_array_equal(cut["x"], [[8, 9], [10, 11]])
    np.testing.assert_array_equal(cut["y"], [4, 5])
