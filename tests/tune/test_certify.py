"""The order of the test, its first failure, and which of what passed is the result."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tuning import TunedPoint
from deploy.errors import UsageError
from deploy.evaluation.gate import Gate, Reference
from deploy.evaluation.intervals import paired_drop
from deploy.evaluation.options import MetricOptions
from deploy.progress import silent
from deploy.tune.certify import certify, check_budget, choose
from deploy.tune.journal import Journal
from deploy.tune.measure import BASE
from deploy.tune.search import Built, Clock
from tests.evaluation.conftest import make_folder as folder_of
from tests.evaluation.conftest import make_model

GREY = Preprocess(channels=1, crop=8)
DARK = Preprocess(channels=1, crop=8, scale=1 / 510)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("images"), ant=[0] * 20, gnu=[6] * 20)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_model(tmp_path_factory.mktemp("good") / "good", preprocess=GREY)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Takes every bright image for one of half the brightness."""
    return make_model(tmp_path_factory.mktemp("bad") / "bad", preprocess=DARK)


def built(name: str, artifact: Artifact | None, speedup: float | None = None) -> Built:
    """speedup: by default the number in the name, or 9."""
    files = {name: "of its own"}
    speedup = speedup or float(name.partition(" ")[2]) + 1 if name.startswith("mix") else 9.0
    return Built(
        point=TunedPoint(
            name=name, int8=["u"], predicted=0.5, speedup=speedup, faster=speedup is not None and speedup > 1, files=files
        ),
        artifact=artifact,
    )


def outcome(
    points: list[Built],
    good: Artifact,
    gate: Gate,
    journal: Journal,
    minutes: float = 1.0,
) -> tuple[list[object], object]:
    reference = Reference(good, gate, silent)
    found, accuracies, stopped = certify(points, reference, gate.backend or "", {"data": 1}, journal, Clock(minutes), silent)
    assert list(accuracies) == [each.point.name for each in found if each.point.verdict is not None]
    return [each.point.verdict for each in found], stopped


def test_the_first_failure_ends_the_test_and_what_comes_behind_is_not_looked_at(
    good: Artifact, bad: Artifact, folder: Path
) -> None:
    gate = Gate(folder=folder, max_drop=10, backend="onnxruntime")
    points = [built("mix 1", good), built("left out", None), built("mix 2", bad), built("mix 3", good)]
    journal = Journal(None)
    assert outcome(points, good, gate, journal) == (["inside", None, "outside", None], None)
    too_few = Gate(folder=folder, max_drop=1, backend="onnxruntime")  # 40 images cannot show that
    assert outcome(points, good, too_few, Journal(None)) == (["undecided", None, None, None], None)
    # What was tested is not run again: an artifact that no longer is what it was is not noticed.
    assert outcome([built("mix 2", good)], good, gate, journal) == (["outside"], None)


def test_only_what_may_be_the_result_is_tested(good: Artifact, bad: Artifact, folder: Path) -> None:
    """Not what is no faster than floating point, nor than a safer one: were that looked at, a failure of it would end the test."""
    gate = Gate(folder=folder, max_drop=10, backend="onnxruntime")
    speeds = {"mix 1": 0.97, "mix 2": 1.2, "mix 3": 1.2, "mix 4": 1.1, "mix 5": 1.3}
    points = [built(name, good if name in ("mix 2", "mix 5") else bad, speed) for name, speed in speeds.items()]
    assert outcome(points, good, gate, Journal(None)) == ([None, "inside", None, None, "inside"], None)
    chance = built("mix 2", bad, 1.4).found(faster=False)  # its median was better, and the rounds do not show it
    assert outcome([points[0], chance, points[4]], good, gate, Journal(None)) == ([None, None, "inside"], None)


def test_when_time_is_over_the_first_is_still_tested(good: Artifact, folder: Path) -> None:
    gate = Gate(folder=folder, max_drop=10, backend="onnxruntime")
    assert outcome([built("mix 1", good), built("mix 2", good)], good, gate, Journal(None), 1e-9) == (["inside", None], "minutes")


def test_an_interruption_leaves_what_has_passed_and_is_raised_where_nothing_has(
    good: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(folder=folder, max_drop=10, backend="onnxruntime")
    compared: Callable[..., object] = Reference.compared

    def interrupted(self: Reference, after: Artifact, backend: str) -> object:
        if left.pop():
            raise KeyboardInterrupt
        return compared(self, after, backend)

    monkeypatch.setattr(Reference, "compared", interrupted)
    points = [built("mix 1", good), built("mix 2", good)]
    left = [True, False]
    assert outcome(points, good, gate, Journal(None)) == (["inside", None], "interrupted")
    left = [True]
    with pytest.raises(KeyboardInterrupt):
        outcome(points, good, gate, Journal(None))


@pytest.mark.parametrize(("count", "limit"), [(40, 5.0), (40, 6.0), (281, 0.98), (281, 0.979)])
def test_a_limit_that_the_images_cannot_show_is_refused_with_how_many_can(
    good: Artifact, tmp_path: Path, count: int, limit: float
) -> None:
    import numpy as np

    folder = folder_of(tmp_path, ant=[0] * count)
    same = np.ones(count, dtype=bool)
    possible = paired_drop(same, same)[2] <= limit
    gate = Gate(folder=folder, max_drop=limit, backend="onnxruntime")
    if possible:
        check_budget(good, gate)
        return
    with pytest.raises(
        UsageError, match=rf"{count} images of .* cannot show that at most {limit:g} points .* give [\d,]+ or more"
    ) as error:
        check_budget(good, gate)
    needed = int(str(error.value).partition(" give ")[2].partition(" ")[0].replace(",", ""))
    for images in (needed - 1, needed):
        same = np.ones(images, dtype=bool)
        assert (paired_drop(same, same)[2] <= limit) == (images == needed)


def test_no_images_show_that_nothing_at_all_is_lost(good: Artifact, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no number of images can show .* at most 0 points"):
        check_budget(good, Gate(folder=folder, max_drop=0))
    check_budget(good, Gate(folder=folder, metric=MetricOptions(metric="cosine")))


def point(name: str, speedup: float, verdict: str | None, **others: object) -> TunedPoint:
    ends = {"low": speedup - 0.1, "high": speedup + 0.1}
    return TunedPoint(name=name, int8=["u"], predicted=0.5, speedup=speedup, verdict=verdict, **{**ends, **others})  # type: ignore[arg-type]


GATE = Gate(folder=Path("images"), max_drop=1, backend="onnxruntime")


@pytest.mark.parametrize(
    ("points", "result", "because"),
    [
        (
            [("mix 1", 1.2, "inside"), ("mix 2", 1.5, "inside"), ("int8", 1.9, "outside")],
            "mix 2",
            "the fastest of 2 that are shown",
        ),
        (
            [("mix 1", 0.95, None), ("int8", 0.9, None)],
            BASE,
            "no mix is faster than floating point: mix 1 has 0.95 times its speed",
        ),
        (
            [("mix 1", 1.06, None), ("int8", 0.9, None)],
            BASE,
            "no mix is shown to be faster than floating point: mix 1 has 1.06 times its speed",
        ),
        ([("mix 1", 0.9, None), ("mix 2", 1.2, "inside"), ("int8", 1.3, "undecided")], "mix 2", "the fastest of 1 that"),
    ],
)
def test_the_fastest_that_passed_is_the_result_unless_floating_point_is_faster(
    points: list[tuple[str, float, str | None]], result: str, because: str
) -> None:
    found = choose([point(*each) for each in points], GATE)
    assert found.name == result
    assert because in found.because


def test_where_none_passes_it_says_what_the_safest_lost_and_how_many_images_would_decide() -> None:
    first = point("mix 1", 1.5, "undecided", loss=0.2, loss_low=-0.4, loss_high=1.3, images=250)
    found = choose([first, point("int8", 1.9, None)], GATE)
    assert found.name == BASE
    assert found.because == (
        "no mix is shown to keep within 1 point of top-1: mix 1, the safest that was tested, loses 0.20 (95 % interval -0.40 to 1.30); 250 more images"
        " would decide"
    )


def test_what_passed_and_was_left_out_all_the_same_is_not_the_result() -> None:
    points = [point("mix 1", 1.2, "inside"), point("mix 2", 1.5, "inside", left_out="it is too far off")]
    assert choose(points, GATE).name == "mix 1"
    assert choose(points[1:], GATE).because.endswith("of top-1: mix 2 was left out, it is too far off")
    failed = point("mix 3", 1.6, "outside", loss=3.0)
    assert choose([points[1], failed], GATE).because.endswith(
        "that was tested, loses 3.00; mix 2 was left out, it is too far off"
    )


def test_where_all_were_left_out_it_says_why() -> None:
    points = [point(name, 1.5, None, left_out=f"{name} is too far off") for name in ("mix 1", "int8")]
    assert choose(points, GATE).because == (
        "no mix was tested against the limit of 1 point of top-1: mix 1 was left out, mix 1 is too far off; int8 was left out, int8 is too far off"
    )
