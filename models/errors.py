"""The error of this package, and the wording of names that are almost right."""

import difflib
from collections.abc import Iterable


class ModelError(ValueError):
    """An architecture, an argument or a layer that does not exist."""


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for up to three names of `known` that are almost `name`, else nothing."""
    found = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
