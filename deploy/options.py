"""Options as fields of frozen dataclasses: the name, type, default, help text and check of an option stand in one place.

    @dataclass(frozen=True, kw_only=True)
    class CutOptions:
        width: int | None = option(None, "Width of the cut.", metavar="MM")
        keep: bool = option(True, "Throw the rest away.")  # typed as --no-keep

The command line generates its options from these fields (`deploy.cli.options`); a public function has a parameter for each
and makes the dataclass with `collect`. The checks are in `__post_init__`.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Described:
    """How an option is typed and explained on the command line.

    flag: None for the field's name with dashes. default: what the help says in place of a default of None.
    switches: for a field that takes one of a few values, the help text of a flag for each (`--fp16`, `--bf16`).
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    default: str | None = None
    switches: Mapping[str, str] | None = None


def option(
    value: Any = MISSING,
    text: str = "",
    *,
    flag: str | None = None,
    metavar: str | None = None,
    default: str | None = None,
    switches: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field with the default `value` and the help `text`; the rest as in `Described`."""
    described = Described(help=text, flag=flag, metavar=metavar, default=default, switches=switches)
    if isinstance(value, dict):
        return field(default_factory=value.copy, metadata={"option": described})
    return field(default=value, metadata={"option": described})


def described_fields(kind: type) -> list[tuple[Field[Any], Described]]:
    """The fields of `kind` that are options, in order."""
    return [(each, each.metadata["option"]) for each in fields(kind) if "option" in each.metadata]


def option_names(kind: type) -> list[str]:
    return [each.name for each, _ in described_fields(kind)]


def collect(kind: type[T], given: Mapping[str, Any], **others: Any) -> T:
    """Make the dataclass `kind` from those of the `given` arguments that are its options, and `others` for fields that are none.

    Strings become paths, and lists tuples, where the field is one. Raises what the checks of `kind` raise.
    """
    hints = get_type_hints(kind)
    chosen = {each.name: _fit(given[each.name], hints[each.name]) for each, _ in described_fields(kind) if each.name in given}
    return kind(**chosen, **others)


def _fit(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    wanted = plain_type(hint)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if get_origin(wanted) is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return value


def plain_type(hint: Any) -> Any:
    """`int` for `int | None`; other types as they are."""
    if get_origin(hint) in (types.UnionType,):
        left = [part for part in get_args(hint) if part is not type(None)]
        return left[0] if len(left) == 1 else hint
    return hint
