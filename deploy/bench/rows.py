"""The results of a benchmark, and the document of `deploy bench --json`."""

from dataclasses import asdict, dataclass
from typing import Any

from deploy.bench.options import BASELINE
from deploy.bench.plan import Skipped
from deploy.evidence.timing import Ratio
from deploy.runtime.profiling import LayerTime

SCHEMA = 3
UNCERTAIN = "uncertain"
"""The verdict on what other programs disturbed."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One candidate at one batch size, from numpy arrays to numpy arrays.

    images_per_s: batch divided by the mean time of a run. speedup, speedup_low, speedup_high: over the baseline, see
    `timing.paired_ratio`; no narrower than what other programs did allows, see `disturbance`. verdict: `baseline`, `faster`, `slower`,
    `no difference` if the interval spans 1, or `uncertain`. certain: whether what others did leaves the times of the row and of its
    baseline as they are, within `disturbance.MOST`; uncertain_because: why not. others_cores: cores that other programs used in the
    rounds. waited_share: of the time in which a thread of the candidate, or of the baseline, waited for a core. Of the
    two, these are of the one that was disturbed more; None if not known. step_ns, handoff_us: how fast the cores were in these
    rounds, and how far apart, see `host.core_probe.CoreState`; None if not known.
    max_abs_error: the largest difference to the baseline's outputs on the same input, None if only one of the two is
    finite. first_ms: the first run of the first batch size after opening, which took load_s. peak_bytes, gpu_bytes: memory of
    the candidate's process, libraries included; gpu_bytes is None without a GPU. size_bytes: size on disk of what runs.
    top1, top5: accuracy in per cent, measured, or, with `accuracy_from` `manifest`, that of the artifact's accuracy gate.
    score: of the metric that was asked for, as `artifact.manifest.Score` has it, and from the same source; a loss is that to the
    baseline's where it was measured, to the FP32 parent's where it is the manifest's. None where nothing is known.
    gflops: operations a second at p50, in 10^9; roof_gflops: the most that the machine allows in FP32, see
    `bench.roofline`; INT8 may go beyond it. Both are None on a GPU, and if the operations of the graph cannot be counted.
    gpu_ms, h2d_ms, d2h_ms: p50 of the computation on the GPU and of the copies to and from it, by CUDA events; None on the
    CPU. samples_ms: every timed run, in order; rounds: the number of them in each round.
    """

    artifact: str
    precision: str
    backend: str
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    mean_ms: float
    images_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    verdict: str
    certain: bool
    uncertain_because: str | None
    others_cores: float | None
    waited_share: float | None
    step_ns: float | None
    handoff_us: float | None
    max_abs_error: float | None
    first_ms: float
    load_s: float
    peak_bytes: int
    gpu_bytes: int | None
    size_bytes: int
    top1: float | None
    top5: float | None
    accuracy_from: str | None
    score: dict[str, Any] | None
    gflops: float | None
    roof_gflops: float | None
    gpu_ms: float | None
    h2d_ms: float | None
    d2h_ms: float | None
    samples_ms: tuple[float, ...]
    rounds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LoadRow:
    """One candidate under load, see `traffic.put_on`. concurrency or rate: which load; the other is None.

    requests_per_s: answered requests over the time that they took; less than the rate if the candidate cannot keep up. The
    others are then `unanswered`, and are among the samples with the time that they had waited. certain, uncertain_because: as of `BenchRow`, of this
    candidate alone.
    """

    artifact: str
    precision: str
    backend: str
    batch: int
    concurrency: int | None
    rate: float | None
    requests: int
    unanswered: int
    requests_per_s: float
    images_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    certain: bool
    uncertain_because: str | None
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ScenarioRow:
    """One candidate in one of LoadGen's scenarios, see `loadgen.Judged`. batch: largest number of samples in a batch.

    target_qps, target_ms: those of `server`, else None. logs: the folder of LoadGen's own logs.
    """

    artifact: str
    precision: str
    backend: str
    batch: int
    scenario: str
    target_qps: float | None
    target_ms: float | None
    valid: bool
    reasons: tuple[str, ...]
    value: float
    unit: str
    queries: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    logs: str


@dataclass(frozen=True, kw_only=True)
class LayersRow:
    """The times of one candidate's layers, in the order in which they run."""

    artifact: str
    precision: str
    backend: str
    batch: int
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything that was measured. skipped: candidates that cannot run here. failures: those that started and broke.

    baseline: the backend that the speed-ups are over. interrupted: by Ctrl-C, before everything was measured. artifacts: the
    artifacts that were measured or skipped and all their ancestors, parents first, with their evidence.
    """

    conditions: dict[str, Any]
    results: tuple[BenchRow, ...]
    skipped: tuple[Skipped, ...]
    failures: tuple[Skipped, ...] = ()
    baseline: str = BASELINE
    interrupted: bool = False
    artifacts: tuple[dict[str, Any], ...] = ()
    loads: tuple[LoadRow, ...] = ()
    scenarios: tuple[ScenarioRow, ...] = ()
    layers: tuple[LayersRow, ...] = ()

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy bench --json`; failures are among `skipped`."""
        return {
            "schema": SCHEMA,
            "baseline": self.baseline,
            "interrupted": self.interrupted,
            "conditions": self.conditions,
            "results": [asdict(row) for row in self.results],
            "loads": [asdict(row) for row in self.loads],
            "scenarios": [asdict(row) for row in self.scenarios],
            "layers": [asdict(row) for row in self.layers],
            "artifacts": list(self.artifacts),
            "skipped": [asdict(entry) for entry in (*self.skipped, *self.failures)],
        }


def verdict_of(speed: Ratio) -> str:
    """`faster` or `slower` than the baseline, or `no difference` if the interval spans 1."""
    return "faster" if speed.low > 1 else "slower" if speed.high < 1 else "no difference"
