"""Small pieces of the English in messages: counts with their nouns, and names that are almost right."""

from collections.abc import Iterable
from pathlib import Path


def count_of(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`: a count with its noun."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def a_type(value: object) -> str:
    """`an int`, `a list`: the type of a value with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def is_utf8(path: Path | str) -> bool:
    """Whether a path can be given to libraries that take no other encoding. Python keeps other bytes as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for up to three names of `known` that are almost `name`; empty if none is."""
    import difflib  # slow to import, and needed for errors alone

    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def as_utf8(text: Path | str) -> str:
    """Text that UTF-8 can hold: bytes of a path that are none are written as `\\xe9`."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(path: Path | str) -> str:
    """A path on one line, as text that UTF-8 can hold: see `as_utf8`; a line feed is written as `\\n`."""
    text = as_utf8(path)
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def show_bytes(error: UnicodeError) -> tuple[str, int]:
    """What a stream writes for characters that it cannot encode: as `as_utf8` does, so that a path always looks the same.

    An error handler for `codecs.register_error`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(
        f"\\x{ord(each) - 0xDC00:02x}" if 0xDC80 <= ord(each) <= 0xDCFF else each.encode("ascii", "backslashreplace").decode()
        for each in found
    ), error.end
