"""Words for people: counts with their nouns."""


def count_of(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`: a count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
