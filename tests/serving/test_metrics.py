"""The text of /metrics, by the counts behind it."""

import re

import pytest

from deploy.errors import BackendError, DeadlineError, InputError, QueueFullError
from deploy.runtime.batching.queue import BatchRecord
from deploy.serving.metrics import BUCKETS_MS, Meter, reason_of, render


def record(*total_s: float, error: BaseException | None = None) -> BatchRecord:
    """A batch of a row for each request, of which each waited a tenth of its time."""
    return BatchRecord(
        rows=len(total_s), queue_s=[0.1 * total for total in total_s], input_s=0.001, infer_s=0.002, output_s=0.003,
        total_s=list(total_s), error=error,
    )  # fmt: skip


def value(text: str, series: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(f"{series} ")).rpartition(" ")[2])


def test_requests_rows_batches_and_durations_are_added_up() -> None:
    meter = Meter("net", "2")
    meter.waiting = lambda: 5
    meter.batch(record(0.010, 0.030))
    meter.batch(record(0.020))
    text = render([meter])
    labels = '{model="net",version="2"}'
    assert value(text, f"nv_inference_request_success{labels}") == 3
    assert value(text, f"nv_inference_count{labels}") == 3
    assert value(text, f"nv_inference_exec_count{labels}") == 2
    assert value(text, f"nv_inference_pending_request_count{labels}") == 5
    assert value(text, f"nv_inference_request_duration_us{labels}") == 60_000
    assert value(text, f"nv_inference_queue_duration_us{labels}") == 6_000
    assert value(text, f"nv_inference_compute_infer_duration_us{labels}") == 6_000, "of every request the whole step"


def test_the_histogram_is_cumulative() -> None:
    meter = Meter("net", "1")
    meter.batch(record(0.0001, 0.0003, 0.004, 20.0))
    text = render([meter])
    counts = [int(count) for count in re.findall(r"_bucket\{.*\} (\d+)", text)]
    assert len(counts) == len(BUCKETS_MS) + 1
    assert counts == sorted(counts)
    assert (counts[0], counts[2], counts[-2], counts[-1]) == (1, 2, 3, 4)
    assert value(text, 'nv_inference_latency_histogram_ms_count{model="net",version="1"}') == 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("x"), "REJECTED"), (DeadlineError("x"), "REJECTED"), (InputError("x"), "OTHER"),
        (BackendError("x"), "BACKEND"), (ZeroDivisionError("x"), "BACKEND"), (KeyboardInterrupt(), "CANCELED"),
    ],
)  # fmt: skip
def test_failures_are_counted_by_reason(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
    meter = Meter("net", "1")
    meter.batch(record(0.1, 0.1, error=error))
    meter.failed(error, 0.3)
    assert value(render([meter]), f'nv_inference_request_failure{{model="net",version="1",reason="{reason}"}}') == 3
    assert meter.counts().failed_ns == 500_000_000


def test_labels_are_escaped_and_a_replica_is_named() -> None:
    text = render([Meter('a"b\\c\nd', "1")], replica="r#1")
    assert r'{model="a\"b\\c\nd",version="1",replica="r#1"}' in text
