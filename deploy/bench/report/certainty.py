"""What a report says of figures that other programs disturbed."""

from collections.abc import Iterable, Mapping
from typing import Any

from deploy.host.core_probe import APART
from deploy.words import count_of


def warnings(uncertain: Iterable[tuple[int, str]], disturbance: Mapping[str, Any]) -> list[str]:
    """What is uncertain, why, and what to do; nothing if all is certain.

    uncertain: batch size and reason of each result that is. disturbance: that of the conditions.
    """
    reasons = dict(uncertain)  # the last of each batch: they hardly differ
    lines = []
    for why in dict.fromkeys(reasons.values()):
        batches = [str(batch) for batch, reason in reasons.items() if reason == why]
        which = f"Batch {batches[0]} is" if len(batches) == 1 else f"Batches {', '.join(batches[:-1])} and {batches[-1]} are"
        lines.append(f"{which} uncertain: {why}.")
    if lines:
        lines.append(advice(disturbance))
    return lines


def advice(disturbance: Mapping[str, Any]) -> str:
    """How to measure what is uncertain."""
    threads = disturbance["fewer_threads"]
    if threads is None:
        return "No verdict is drawn from it. Run again on a quieter machine."
    left = count_of(disturbance["cores"] - threads, "core")
    return f"No verdict is drawn from it. Run again on a quieter machine, or with --threads {threads}, which leaves {left} to others."


def gaps(disturbance: Mapping[str, Any]) -> list[str]:
    """What could not be measured of other programs."""
    return [f"Not measured here: {what}." for what in disturbance["not_measured"]]


def distance(disturbance: Mapping[str, Any]) -> str | None:
    """How far apart the cores were; None if nobody knows, or there is one."""
    if (ends := disturbance.get("handoff_us")) is None:
        return None
    least, most = ends
    return f"{least:.2f} us from core to core" if most <= APART * least else f"{least:.2f} to {most:.2f} us from core to core"
