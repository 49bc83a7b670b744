"""Counts and durations of requests, for `/metrics` and a model's statistics, under the names that Triton Inference Server uses.

Prometheus' text format 0.0.4 is written by hand because its client library appends `_total` to the names of counters.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from deploy.errors import DeadlineError, InputError, QueueFullError
from deploy.runtime.batching.queue import BatchRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BUCKETS_MS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
"""Upper bounds of the latency histogram's buckets, in milliseconds."""

REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's reasons for failures."""

_STEPS = ("request", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Counts:
    """Totals of one model version since it was first loaded.

    duration_ns: by step, summed over requests that succeeded. As in Triton, a request counts the whole time of its batch's steps.
    failed_ns: the whole time of the others.
    """

    success: int = 0
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    failed_ns: int = 0
    inferences: int = 0
    executions: int = 0
    duration_ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_STEPS, 0))
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_MS) + 1))


class Meter:
    """Counts the requests of one model version. `waiting` returns how many are in its queue. Safe to use from many threads."""

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self.waiting: Callable[[], int] = lambda: 0
        self._counts = Counts()
        self._lock = threading.Lock()

    def batch(self, record: BatchRecord) -> None:
        """Count a batch that has been run; `Batcher` calls this."""
        if record.error is not None:
            self.failed(record.error, *record.total_s)
            return
        requests = len(record.queue_s)
        with self._lock:
            counts = self._counts
            counts.success += requests
            counts.inferences += record.rows
            counts.executions += 1
            for step, seconds in zip(
                _STEPS,
                (
                    sum(record.total_s),
                    sum(record.queue_s),
                    record.input_s * requests,
                    record.infer_s * requests,
                    record.output_s * requests,
                ),
                strict=True,
            ):
                counts.duration_ns[step] += round(seconds * 1e9)
            for seconds in record.total_s:
                counts.buckets[bisect_left(BUCKETS_MS, seconds * 1e3)] += 1

    def failed(self, error: BaseException, *total_s: float) -> None:
        """Count requests that failed or were refused. total_s: seconds of each from its arrival to its answer."""
        with self._lock:
            self._counts.failures[reason_of(error)] += len(total_s)
            self._counts.failed_ns += round(sum(total_s) * 1e9)

    def counts(self) -> Counts:
        """A copy of the totals."""
        with self._lock:
            counts = self._counts
            return Counts(
                success=counts.success,
                failures=dict(counts.failures),
                failed_ns=counts.failed_ns,
                inferences=counts.inferences,
                executions=counts.executions,
                duration_ns=dict(counts.duration_ns),
                buckets=list(counts.buckets),
            )


def reason_of(error: BaseException) -> str:
    """Why a request failed, as one of `REASONS`."""
    if isinstance(error, QueueFullError | DeadlineError):
        return "REJECTED"
    if isinstance(error, InputError):
        return "OTHER"
    if isinstance(error, Exception):
        return "BACKEND"
    return "CANCELED"


def render(meters: Sequence[Meter], replica: str | None = None) -> str:
    """The text of `/metrics`. replica: the value of a label of that name, for one of several servers behind one address."""
    counted = [(meter, meter.counts()) for meter in meters]
    lines: list[str] = []

    def labels(meter: Meter, **more: str) -> str:
        pairs = {"model": meter.model, "version": meter.version, **({"replica": replica} if replica else {}), **more}
        return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in pairs.items()) + "}"

    def series(name: str, kind: str, text: str, values: Iterator[tuple[str, float]]) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{labels} {value}" for labels, value in values)

    def plain(value: Callable[[Meter, Counts], float]) -> Iterator[tuple[str, float]]:
        return ((labels(meter), value(meter, counts)) for meter, counts in counted)

    series("nv_inference_request_success", "counter", "Requests that were answered", plain(lambda _, c: c.success))
    series(
        "nv_inference_request_failure", "counter", "Requests that failed, by reason",
        ((labels(meter, reason=reason), count) for meter, counts in counted for reason, count in counts.failures.items()),
    )  # fmt: skip
    series("nv_inference_count", "counter", "Rows that were computed", plain(lambda _, c: c.inferences))
    series("nv_inference_exec_count", "counter", "Batches that were run", plain(lambda _, c: c.executions))
    series("nv_inference_pending_request_count", "gauge", "Requests that wait", plain(lambda meter, _: meter.waiting()))
    for step in _STEPS:
        text = f"Microseconds of the step {step}, of all requests together"
        series(f"nv_inference_{step}_duration_us", "counter", text, plain(lambda _, c, s=step: c.duration_ns[s] // 1000))  # type: ignore[misc]
    name = "nv_inference_latency_histogram_ms"
    lines.extend((f"# HELP {name} Milliseconds from the arrival of a request to its answer", f"# TYPE {name} histogram"))
    for meter, counts in counted:
        total = 0
        for end, count in zip((*map(str, BUCKETS_MS), "+Inf"), counts.buckets, strict=True):
            total += count
            lines.append(f"{name}_bucket{labels(meter, le=end)} {total}")
        lines.append(f"{name}_sum{labels(meter)} {counts.duration_ns['request'] / 1e6}")
        lines.append(f"{name}_count{labels(meter)} {total}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
