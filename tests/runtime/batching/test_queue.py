"""The queue of a batcher: priorities, order and rows."""

from deploy.runtime.batching.queue import Request, RequestQueue

WAIT_S = 20


def test_the_queue_keeps_priorities_orders_and_rows() -> None:
    def request(rows: int, key: str = "a", priority: int = 5) -> Request:
        return Request(
            {}, rows=rows, key=key, priority=priority, timeout_s=None, start=lambda: True, finish=lambda outputs, error: None
        )

    queue = RequestQueue()
    assert not queue
    asked = [request(2), request(3, "b"), request(2), request(4), request(1, priority=1), request(1)]
    for each in asked:
        queue.put(each)
    assert (len(queue), queue.rows) == (6, 13)
    assert queue.first is asked[4]
    assert queue.holds(9)
    assert not queue.holds(11)  # "b" is not counted
    assert queue.take(5) == [asked[4], asked[0], asked[2]]  # the next of its sort does not fit: the one behind it waits too
    queue.remove(asked[3])
    assert asked[3] not in queue
    assert queue.take(None) == [asked[1]]
    assert queue.take(8) == [asked[5]]
    assert (len(queue), queue.rows, bool(queue)) == (0, 0, False)
