"""Parts of a module whose names are no Python identifiers, which the code that torch.fx writes for a graph stumbles over."""

from collections.abc import Iterator
from contextlib import contextmanager
from keyword import iskeyword

import torch.fx.graph


@contextmanager
def any_attribute_name() -> Iterator[None]:
    """While it is active, torch.fx writes an access to `self.class`, or to a name with a quote in it, so that Python reads it."""
    original = torch.fx.graph._format_target  # it writes keywords as they are, and names in quotes without escaping them
    torch.fx.graph._format_target = _access
    try:
        yield
    finally:
        torch.fx.graph._format_target = original


def _access(base: str, target: str) -> str:
    for name in target.split("."):
        base = f"{base}.{name}" if name.isidentifier() and not iskeyword(name) else f"getattr({base}, {name!r})"
    return base
