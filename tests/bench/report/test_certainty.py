"""What a report says of figures that other programs disturbed."""

import pytest

from deploy.bench.report.certainty import gaps, warnings

WHERE = {"cores": 4, "fewer_threads": 3, "not_measured": ["this", "that"]}


@pytest.mark.parametrize(
    ("uncertain", "first"),
    [
        ([(1, "a")], "Batch 1 is uncertain: a."),
        ([(1, "a"), (1, "a"), (8, "a"), (32, "a")], "Batches 1, 8 and 32 are uncertain: a."),
        ([(1, "a"), (8, "b"), (32, "a")], "Batches 1 and 32 are uncertain: a."),
    ],
)
def test_batches_with_one_reason_are_said_together(uncertain: list[tuple[int, str]], first: str) -> None:
    found = warnings(uncertain, WHERE)
    assert found[0] == first
    assert len(found) == len({why for _, why in uncertain}) + 1
    assert found[-1].endswith("or with --threads 3, which leaves 1 core to others.")


def test_fewer_threads_are_advised_only_where_they_leave_the_others_room() -> None:
    assert warnings([(1, "a")], {**WHERE, "fewer_threads": None})[-1].endswith("Run again on a quieter machine.")


def test_nothing_is_said_of_what_is_certain() -> None:
    assert warnings([], WHERE) == []
    assert gaps(WHERE) == ["Not measured here: this.", "Not measured here: that."]
