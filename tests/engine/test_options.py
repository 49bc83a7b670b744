"""Build options that cannot be meant are refused before TensorRT is loaded."""

from pathlib import Path
from typing import Any

import pytest

from deploy.engine.options import BuildOptions
from deploy.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt_level": -1}, "`opt_level` must be 0 to 5, not -1"),
        ({"opt_level": 6}, "`opt_level` must be 0 to 5, not 6"),
        ({"workspace": 0}, "`workspace` must be 1 MiB or more, not 0"),
        ({"targets": ("8.6", "sm_90")}, "`targets` must be compute capabilities such as 8.6, not 'sm_90'"),
        ({"targets": ("8.6", "8.9", "8.6")}, "`targets` names one compute capability twice"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opt_level": 0},
        {"opt_level": 5, "workspace": 1, "timing_cache": Path("timings")},
        {"targets": ("7.5", "12.0")},
    ],
)
def test_options_at_the_ends_of_their_ranges_are_taken(options: dict[str, Any]) -> None:
    taken = BuildOptions(**options)
    assert {name: getattr(taken, name) for name in options} == options
