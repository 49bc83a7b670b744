"""The error of this package, and a hint for names that are almost right."""

import difflib
from collections.abc import Iterable


class ModelError(ValueError):
    """An unknown architecture, argument or layer."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for up to three names of `known` that are almost `name`; empty if none is.

    The same as in `deploy.words`, which this package cannot import.
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
