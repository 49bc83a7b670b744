from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.errors import UsageError
from deploy.options import collect, option, option_names


@dataclass(frozen=True, kw_only=True)
class Cut:
    width: int | None = option(None, "Width of the cut.")
    marks: tuple[str, ...] = option((), "Marks.")
    folder: Path | None = option(None, "Where.")
    inner: str = "no option"

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise UsageError(f"`width` must be 1 or more, not {self.width}")


def test_fields_without_a_description_are_no_options() -> None:
    assert option_names(Cut) == ["width", "marks", "folder"]


def test_arguments_become_the_fields_types_and_those_of_others_are_left_out() -> None:
    made = collect(Cut, {"width": 3, "marks": ["a", "b"], "folder": "x/y", "inner": "not taken", "progress": print})
    assert made == Cut(width=3, marks=("a", "b"), folder=Path("x/y"))
    assert collect(Cut, {}) == Cut()


def test_the_checks_of_the_dataclass_are_made() -> None:
    with pytest.raises(UsageError, match="`width` must be 1 or more, not 0"):
        collect(Cut, {"width": 0})
