"""The certificate: which mixes keep within the limit, and which of them is the result.

Several looks at the same images would each have its own chance of a false pass. So the order is fixed before, on calibration data,
and the first mix that does not pass ends the test: the chance that any mix passes which should not is that of a single test, 2.5 %
for the upper end of a 95 % interval (the fixed-sequence procedure: Maurer, Hothorn and Lehmacher 1995, Multiple comparisons in drug
clinical trials and preclinical assays; Westfall and Krishen 2001, J. Stat. Plan. Inference 99).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy
from deploy.artifact.summary import metric_text, points_text
from deploy.artifact.tuning import Stopped, TunedPoint
from deploy.errors import UsageError
from deploy.evaluation.gate import NEVER, Gate, Reference, verdict_of
from deploy.evaluation.intervals import images_to_certify
from deploy.evaluation.scoring import FIDELITY, scoring
from deploy.progress import Progress
from deploy.tune.journal import Journal
from deploy.tune.measure import BASE
from deploy.tune.search import Built, Clock
from deploy.words import count_of


def check_budget(artifact: Artifact, gate: Gate) -> None:
    """Raise UsageError where no mix could be certified, whatever it does: where the images are too few for the limit."""
    if gate.metric.metric not in ("top1", "top5"):
        return
    count = len(scoring(artifact, gate.folder, gate.metric).data.files)
    needed = images_to_certify(gate.limit)
    if needed is None:
        raise UsageError(
            f"no number of images can show that at most {gate.limit:g} points are lost: `max_drop` must be more than 0"
        )
    if count < needed:
        raise UsageError(
            f"{count_of(count, 'image')} of {gate.folder} cannot show that at most {gate.limit:g} points are lost, even where none is lost:"
            f" give {needed:,} or more, or a greater `max_drop`"
        )


def certify(
    points: Sequence[Built],
    reference: Reference,
    backend: str,
    data: Mapping[str, Any],
    journal: Journal,
    clock: Clock,
    progress: Progress,
) -> tuple[list[Built], dict[str, Accuracy], Stopped | None]:
    """Test the points that may be the result in their order until one does not pass; returns them, what was found by name, and why it stopped early.

    What is in the journal is not tested again. backend: where they run. data: what the verdict depends on besides the files. Ctrl-C ends the test after a point has been tested; before, it is raised.
    """
    tested = list(points)
    found: dict[str, Accuracy] = {}
    front = _front(points)
    for done, index in enumerate(front):
        each = points[index]
        assert each.artifact is not None
        if found and clock.over():
            return tested, found, "minutes"
        progress(f"testing {each.point.name}", done, len(front))
        key = {"files": each.point.files, **data}
        try:
            accuracy = journal.accuracy(key) or reference.compared(each.artifact, backend)
        except KeyboardInterrupt:
            if not found:
                raise
            return tested, found, "interrupted"
        journal.add_accuracy(key, accuracy)
        found[each.point.name] = accuracy
        tested[index] = _judged(each, accuracy)
        if tested[index].point.verdict != "inside":
            break
    return tested, found, None


def _front(points: Sequence[Built]) -> list[int]:
    """The places of those that are shown to be faster than floating point, and are faster than all such that are safer: no other can be the result."""
    found: list[int] = []
    fastest = 1.0
    for index, each in enumerate(points):
        if each.artifact is not None and each.point.faster and each.point.speedup is not None and each.point.speedup > fastest:
            fastest = each.point.speedup
            found.append(index)
    return found


def _judged(each: Built, accuracy: Accuracy) -> Built:
    score = accuracy.judged
    finite = score.value if math.isfinite(score.value) else None
    return each.found(
        verdict=verdict_of(accuracy),
        value=finite,
        loss=score.loss,
        loss_low=score.loss_low,
        loss_high=score.loss_high,
        images=accuracy.undecided,
    )


class Choice(NamedTuple):
    """The name of the point that is the result, or BASE, and why."""

    name: str
    because: str


def choose(points: Sequence[TunedPoint], gate: Gate) -> Choice:
    """The fastest of the points that passed, which are faster than floating point, or else floating point."""
    passed = [point for point in points if point.verdict == "inside" and point.left_out is None]
    limit = _limit(gate)
    if not passed:
        first = next((point for point in points if point.verdict is not None and point.left_out is None), None)
        if first is None:
            return Choice(BASE, _none_tested(points, limit))
        return Choice(BASE, "; ".join([f"no mix is shown to keep within {limit}: {_shown(first, gate)}", *_left_out(points)]))
    best = max(passed, key=lambda point: point.speedup or 0.0)
    return Choice(best.name, f"the fastest of {len(passed)} that are shown to keep within {limit}")


def _none_tested(points: Sequence[TunedPoint], limit: str) -> str:
    """Why nothing was held to the limit."""
    reasons = "; ".join(_left_out(points))
    timed = [point for point in points if point.speedup is not None and point.left_out is None]
    if not timed:
        return f"no mix was tested against the limit of {limit}{reasons and ': ' + reasons}"
    best = max(timed, key=lambda point: point.speedup or 0.0)
    slower = f"no mix is {'shown to be ' * ((best.speedup or 0.0) > 1)}faster than floating point: {best.name} has {best.speedup:.2f} times its speed"
    return f"{slower}; {reasons}" if reasons else slower


def _left_out(points: Sequence[TunedPoint]) -> list[str]:
    return [f"{point.name} was left out, {point.left_out}" for point in points if point.left_out]


def _limit(gate: Gate) -> str:
    metric = metric_text(gate.metric.metric)
    if gate.metric.metric in FIDELITY:
        return f"{metric} {gate.limit:g}"
    points = "" if gate.metric.own is not None else " point" if gate.limit == 1 else " points"
    return f"{gate.limit:g}{points} of {metric}"


def _shown(first: TunedPoint, gate: Gate) -> str:
    """What was found of the safest mix."""
    if first.loss is None:
        value = math.inf if first.value is None else first.value
        said = f"{first.name}, the safest that was tested, has {points_text(value, 'dB' if gate.metric.metric == 'sqnr' else '')}"
    else:
        high = "" if first.loss_high is None else f" (95 % interval {first.loss_low:.2f} to {first.loss_high:.2f})"
        said = f"{first.name}, the safest that was tested, loses {first.loss:.2f}{high}"
    if first.images is None:
        return said
    more = "no number of images" if first.images == NEVER else count_of(first.images, "more image")
    return f"{said}; {more} would decide"
