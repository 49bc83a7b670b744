import io

import pytest

from deploy.bench.plan import Skipped
from deploy.bench.report.table import WIDTH, print_table
from deploy.bench.rows import BenchResult, BenchRow

QUIET = {
    "others_cores": 0.0,
    "waited_share": 0.0,
    "step_ns": [10.9, 10.9],
    "handoff_us": [0.16, 0.17],
    "cores": 2,
    "limit": 0.05,
    "repeated_rounds": 0,
    "fewer_threads": None,
    "not_measured": [],
}


def row(
    artifact: str, backend: str, batch: int, speedup: float, error: float | None = 1.5e-6, because: str | None = None
) -> BenchRow:
    return BenchRow(
        artifact=artifact, precision="fp32", backend=backend, batch=batch, p50_ms=1234.5, p90_ms=35.31, p99_ms=0.01234,
        p999_ms=0.02, mean_ms=1.0, images_per_s=123456.7, speedup=speedup, speedup_low=speedup * 0.9,
        speedup_high=speedup * 1.1, verdict="baseline" if backend == "eager" else "uncertain" if because else "faster" if speedup > 1.2 else "no difference",
        certain=because is None, uncertain_because=because, others_cores=0.0, waited_share=0.0, step_ns=10.9, handoff_us=0.16,
        max_abs_error=error, first_ms=2.0, load_s=0.5, peak_bytes=10**8, gpu_bytes=None, size_bytes=10**6, top1=None, top5=None, score=None,
        accuracy_from=None, gflops=None, roof_gflops=None, gpu_ms=None, h2d_ms=None, d2h_ms=None, samples_ms=(1.0,), rounds=(1,),
    )  # fmt: skip


@pytest.fixture
def result() -> BenchResult:
    names = ("build/efficientnet-lite0-fp16-b32", "build/[net]")
    results = [row(names[0], "eager", 1, 1.0, 0.0), row(names[0], "onnxruntime", 1, 12.34), row(names[1], "openvino", 8, 2, None)]
    return BenchResult(
        conditions={"cpu": "Some [CPU] @ 2 GHz", "threads": 2, "load_average": [0.5, 0.4, 0.3], "disturbance": QUIET},
        results=tuple(results),
        skipped=(Skipped(artifact="build/net-trt", backend="tensorrt-rtx", reason="no GPU"),),
        failures=(Skipped(artifact="build/net", backend="openvino", reason="died"),),
    )


def text(result: BenchResult) -> str:
    file = io.StringIO()
    print_table(result, file)
    return file.getvalue()


def test_the_table_fits_and_has_no_colour_where_it_is_no_terminal(result: BenchResult) -> None:
    lines = text(result).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in text(result)


def test_figures_are_shown_whole(result: BenchResult) -> None:
    shown = text(result)
    for part in ("1,234", "35.3", "0.0123", "123,457", "12.34 (11.11-13.57)", "1.5e-06", "not finite", "onnxruntime"):
        assert part in shown, part


def test_artifacts_go_by_their_last_part_and_brackets_are_kept(result: BenchResult) -> None:
    shown = text(result)
    assert "[net]" in shown
    assert "build/[net]" not in shown
    assert "Some [CPU]" in shown


def test_the_distance_of_the_cores_is_told_where_somebody_knows_it(result: BenchResult) -> None:
    assert "Some [CPU] @ 2 GHz, 2 threads, load average 0.5 at the start, 0.16 us from core to core." in text(result)
    result.conditions["disturbance"] = {**QUIET, "handoff_us": [0.16, 0.34]}
    assert ", 0.16 to 0.34 us from core to core." in text(result)
    result.conditions["disturbance"] = {**QUIET, "handoff_us": None}
    assert "at the start." in text(result)


def test_artifacts_of_one_name_go_by_their_path(result: BenchResult) -> None:
    twins = [row("a/net", "eager", 1, 1.0), row("b/net", "null", 1, 1.0)]
    shown = text(BenchResult(conditions=result.conditions, results=tuple(twins), skipped=()))
    assert "a/net" in shown
    assert "b/net" in shown


def test_what_is_uncertain_has_no_speed_up_and_says_why_and_what_to_do(result: BenchResult) -> None:
    others = "other programs used 0.9 of 2 cores"
    results = [
        row("net", "eager", 1, 1.0, because=others),
        row("net", "null", 1, 4321.0, because=others),
        row("net", "eager", 8, 1.0),
        row("net", "null", 8, 2.0),
        row("net", "eager", 32, 1.0, because=others),
    ]
    disturbance = {**QUIET, "fewer_threads": 1, "not_measured": ["the waits of threads for a processor: no such file"]}
    conditions = {**result.conditions, "disturbance": disturbance}
    shown = text(BenchResult(conditions=conditions, results=tuple(results), skipped=()))
    assert "4321" not in shown
    assert [line.count("uncertain") for line in shown.splitlines() if line.startswith("net ")] == [1, 1, 0, 0, 1]
    assert "2.00 (1.80-2.20)" in shown
    said = " ".join(shown.split())
    assert f"Batches 1 and 32 are uncertain: {others}. No verdict is drawn from it." in said
    assert "Run again on a quieter machine, or with --threads 1, which leaves 1 core to others." in said
    assert "Not measured here: the waits of threads for a processor" in said
    assert "uncertain" not in text(result)


def test_what_was_not_run_is_listed_with_the_reason(result: BenchResult) -> None:
    shown = text(result)
    assert "Not run: build/net-trt on tensorrt-rtx: no GPU" in shown
    assert "Failed: build/net on openvino: died" in shown


@pytest.mark.parametrize(("throttled", "said"), [(3, True), (0, False)])
def test_a_gpu_that_was_held_back_during_the_rounds_is_said(result: BenchResult, throttled: int, said: bool) -> None:
    during = {"looks": 20, "throttled": throttled, "throttling": "0x24", "sm_mhz_least": 1500.0}
    shown = text(BenchResult(conditions={**result.conditions, "gpu_during": during}, results=result.results, skipped=()))
    assert ("held the GPU's clocks back in 3 of 20 looks during the rounds (0x24)" in " ".join(shown.split())) == said
    assert "clocks" not in text(result)  # no GPU, nothing watched


def test_a_long_backend_is_folded_and_not_cut(result: BenchResult) -> None:
    backend = "compile:max-autotune-no-cudagraphs,fp16,channels_last"
    shown = text(BenchResult(conditions=result.conditions, results=(row("a/net", backend, 1, 1.0),), skipped=()))
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "…" not in shown
    lines = shown.splitlines()
    start = lines[0].index("backend")
    folded = [line[start : lines[0].index("batch")].strip() for line in lines[1:4]]
    assert "".join(folded) == backend


@pytest.mark.parametrize(
    ("threads", "shown"), [(1, "GHz, 1 thread, load"), (2, "GHz, 2 threads, load"), (16, "GHz, 16 threads, load")]
)
def test_threads_are_counted_as_people_do(result: BenchResult, threads: int, shown: str) -> None:
    conditions = {**result.conditions, "threads": threads}
    assert shown in text(BenchResult(conditions=conditions, results=result.results, skipped=()))
