"""How work in progress is told to whoever shows it."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done and, where it is known, how much of how much. Calls may come from any thread."""

    def __call__(self, what: str, done: int = 0, total: int = 0, /) -> None: ...


def silent(what: str, done: int = 0, total: int = 0, /) -> None:
    """Shows nothing."""
