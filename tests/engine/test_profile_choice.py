"""Which profile of an engine the shapes of a feed are run with."""

import pytest

from deploy.artifact.tensors import Profile, ShapeRange
from deploy.engine import profile_choice
from deploy.engine.profile_choice import ProfileChoice
from deploy.errors import InputError


def profile(low: int, best: int, high: int) -> Profile:
    return {
        "x": ShapeRange(min=(low, 3), opt=(best, 3), max=(high, 3)),
        "y": ShapeRange(min=(low,), opt=(best,), max=(high,)),
    }


@pytest.mark.parametrize(
    ("rows", "index"),
    [(1, 0), (4, 0), (6, 1), (12, 1), (16, 1), (17, 2), (64, 2)],
)
def test_of_the_profiles_that_hold_the_shapes_the_one_with_the_nearest_optimum_is_chosen(rows: int, index: int) -> None:
    choice = ProfileChoice("net", ("x", "y"), [profile(1, 2, 8), profile(2, 8, 16), profile(1, 32, 64)])
    for _ in range(2):  # the second time from what is remembered
        assert choice.index(((rows, 3), (rows,))) == index


@pytest.mark.parametrize("shapes", [((9, 3), (9,)), ((2, 4), (2,)), ((2, 3), (9,)), ((2,), (2,)), ((0, 3), (0,))])
def test_shapes_outside_every_profile_are_refused_with_all_ranges(shapes: tuple[tuple[int, ...], ...]) -> None:
    choice = ProfileChoice("net", ("x", "y"), [profile(1, 2, 4), profile(4, 6, 8)])
    expected = r"outside every profile of 'net': expected x=1x3:2x3:4x3, y=1:2:4 or x=4x3:6x3:8x3, y=4:6:8; build with"
    for _ in range(2):
        with pytest.raises(InputError, match=expected):
            choice.index(shapes)


def test_without_profiles_every_shape_is_taken() -> None:
    assert ProfileChoice("net", ("x",), []).index(((7, 7),)) == 0


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_choice, "_KNOWN_SHAPES", 5)
    choice = ProfileChoice("net", ("x", "y"), [profile(1, 1, 30), profile(1, 30, 30)])
    for rows in range(1, 31):
        assert choice.index(((rows, 3), (rows,))) == (rows > 15)
        assert len(choice._known) <= 5
