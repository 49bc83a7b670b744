import numpy as np
import pytest

from deploy.precision.int8 import rows
from deploy.precision.int8.rows import AUDIT_LEAST, AUDIT_MOST, Rows, first_rows, row_count


class Data:
    """A calibration set of `count` rows of one input, whose batch is dynamic unless `fixed`."""

    def __init__(self, count: int, fixed: bool = False) -> None:
        from deploy.artifact.tensors import TensorSpec

        self.count = count
        self.specs = [TensorSpec(name="x", dtype="float32", shape=(2 if fixed else "batch", 3))]

    def feeds(self, batch_size: int):
        for start in range(0, self.count, batch_size):
            size = min(batch_size, self.count - start)
            yield {"x": np.full((size, 3), start, dtype=np.float32)}


def iterated(count: int, batch_size: int) -> Rows:
    result = Rows(Data(count), batch_size, lambda *_: None)
    list(result)
    return result


@pytest.mark.parametrize(("count", "kept"), [(4, 4), (100, AUDIT_LEAST), (160, 10), (5000, AUDIT_MOST)])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_rows_are_counted_and_a_share_of_the_first_is_kept_whatever_the_batch(count, kept, batch_size):
    result = iterated(count, batch_size)
    assert result.count == count
    assert sum(row_count(feed) for feed, _ in result.kept) == kept


def test_what_came_of_a_kept_feed_is_kept_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(rows, "KEPT_BYTES", 100)
    result = Rows(Data(8), 2, lambda *_: None)
    for feed in result:
        result.seen(feed, {"t": np.zeros(10, np.float32)}, {"y": np.zeros(5, np.float32)})  # 60 bytes
    assert [run is not None for _, run in result.kept] == [True, False, False, False]
    taken = [(feed["x"][0, 0], run is not None, [kept for _, kept in result.kept[:1]]) for feed, run in result.runs()]
    assert taken == [(0, True, [None]), (2, False, [None]), (4, False, [None]), (6, False, [None])]
    assert [feed["x"][0, 0] for feed, _ in result.kept] == [0, 2, 4, 6]


def test_a_feed_that_is_kept_in_part_has_no_tensors_for_they_would_not_fit(monkeypatch):
    result = Rows(Data(12), 5, lambda *_: None)
    for feed in result:
        result.seen(feed, {"t": np.zeros(5, np.float32)}, {})
    assert [(row_count(feed), run is not None) for feed, run in result.kept] == [(5, True), (3, False)]


@pytest.mark.parametrize(
    ("fixed", "outputs", "expected"), [(False, 4, 2), (True, 4, 4), (False, 3, 4)], ids=["dynamic", "fixed", "other rows"]
)
def test_the_first_rows_of_a_feed_and_its_outputs(fixed, outputs, expected):
    feed, result = first_rows({"x": np.zeros((4, 3))}, {"y": np.zeros((outputs, 1))}, Data(4, fixed), 2)
    assert row_count(feed) == expected
    assert len(result["y"]) == min(expected, outputs)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_first_rows_come_one_by_one_and_then_again_with_the_others(batch_size):
    result = Rows(Data(10), batch_size, lambda *_: None)
    head = list(result.head(4))
    assert [row_count(feed) for feed in head] == [1, 1, 1, 1]
    assert sum(map(row_count, result)) == result.count == 10
    assert next(Rows(Data(2), batch_size, lambda *_: None).head(4))["x"].shape == (1, 3)


def test_feeds_of_a_fixed_batch_are_not_divided():
    result = Rows(Data(6, fixed=True), 2, lambda *_: None)
    assert [row_count(feed) for feed in result.head(3)] == [2, 2]
    assert sum(map(row_count, result)) == 6
