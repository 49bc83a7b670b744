"""`benchmarks/gpu_report.py` without a GPU: that it runs with whatever is there, and that it says what it is."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
Script = Callable[[str], ModuleType]
KINDS = ("aoti", "onnxruntime", "tensorrt", "tensorrt-rtx")
SUBSETS = [frozenset(kinds) for count in range(len(KINDS) + 1) for kinds in itertools.combinations(KINDS, count)]


@pytest.fixture
def report(script: Script) -> ModuleType:
    return script("gpu_report")


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    """A dry run computes in one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def part(name: str, **found: Any) -> dict[str, Any]:
    where = {
        "gpu": "NVIDIA Fake",
        "driver": "580",
        "cuda": "13.0",
        "cpu": "AMD",
        "cores": 2,
        "versions": {"torch": "2.14"},
        "time": "now",
        "tuned_together": True,
    }
    return {"part": name, "seconds": 1.0, "conditions": where, "missing": {}, **found}


def overhead(bare: float, own_us: float, copied: float) -> dict[str, Any]:
    figures = {
        "label": "aoti fp32",
        "p50_ms": {"bare": 1.0, "session": bare},
        "session_over_bare": {"value": bare, "low": 0.9, "high": 1.1},
        "own_us": own_us,
        "numpy_over_copy_and_compute": copied,
    }
    rows = [{"model": "lenet5", "batch": 1, **figures}, {"model": "resnet50", "batch": 8, **figures}]
    return part("overhead", overhead=rows)


def compared(p50: dict[str, float], baseline: str) -> dict[str, Any]:
    ratios = {label: {"value": p50[baseline] / ms, "low": 0.5, "high": 9.0} for label, ms in p50.items() if label != baseline}
    return {"baseline": baseline, "latency_ms": {label: {"p50": ms} for label, ms in p50.items()}, "speedup": ratios}


@pytest.mark.parametrize("kinds", SUBSETS, ids=lambda kinds: "+".join(sorted(kinds)) or "torch alone")
def test_every_subset_of_what_may_be_there_has_its_tables(
    report: ModuleType, work: Path, threads_put_back: None, kinds: frozenset[str]
) -> None:
    setting = report.Setting(work=work, kinds=kinds, dry=True, batches=(1,), rounds=2, slice_s=0.0, throughput_s=0.001)
    if not (work / "lenet5").exists():
        report.do_job(setting, "export/lenet5")
        report.do_job(setting, "fp16/lenet5")
    parts = []
    for name, figures in (
        ("lenet5", report.measure(setting, "lenet5")),
        ("overhead", report.overhead(setting)),
        ("contexts", report.contexts(setting)),
    ):
        *_, last = figures
        parts.append(part(name, **json.loads(json.dumps(last))))
    table, session, several = parts
    for row in table["rows"]:
        for mode in ("tensors", "numpy"):
            labels = set(row[mode]["latency_ms"])
            assert row[mode]["baseline"] in labels & {"eager fp32", "eager fp32, TF32", "eager fp16", "eager fp16, CUDA graph"}
            assert labels >= {"eager fp32, TF32", "eager fp16, CUDA graph", "compile fp16", "compile fp16, reduce-overhead"}
            assert {kind for kind in KINDS if any(label.split()[0].partition(":")[0] == kind for label in labels)} == kinds
        assert row["parity"].keys() == labels
    assert {kind for kind, reason in table["missing"].items() if reason == "not asked for"} == set(KINDS) - kinds
    assert {row["label"] for row in session["overhead"]} >= {"eager fp32"}
    assert {row["label"].split()[0] for row in several["contexts"]} == kinds & {"tensorrt", "tensorrt-rtx"}
    text = report.report({"parts": parts, "failed": {}})
    for kind in KINDS:
        assert bool(re.search(rf"^\| {kind}[ :]", text, re.MULTILINE)) == (kind in kinds)
    assert ("not asked for" in text) == (kinds != set(KINDS))


def test_the_headline_compares_with_the_strongest_eager(report: ModuleType) -> None:
    p50 = {"eager fp32": 4.0, "eager fp16": 2.0, "compile fp16": 1.0, "aoti fp16": 1.6, "tensorrt fp16": 0.5}
    row = {"batch": 8, "tensors": compared(p50, "eager fp16")}
    row |= {
        "numpy": row["tensors"],
        "gpu_ms": p50,
        "parity": {"aoti fp16": {"max_abs": 1e-3, "cosine": 0.99}, "eager fp16": None},
    }
    built = {"aoti fp16": {"seconds": 30.0, "bytes": 5e7, "share": None}}
    measured = [part("resnet50", model="resnet50", rows=[row], engines=built, missing={"x, batch 8": "why", "y": "why"})]
    text = report.report({"parts": measured, "failed": {"overhead": "it took more than 180 s"}})
    assert (
        "- resnet50, batch 8: the strongest eager, eager fp16, takes 2.000 ms; compile fp16 1.000 ms (2.00, 0.50 to 9.00 times as"
        " fast); tensorrt fp16 0.500 ms (4.00, 0.50 to 9.00 times as fast)\n" in text
    )
    assert "2.000 (baseline)" in text
    assert "- x, batch 8; y: why\n" in text
    assert "- overhead was not measured: it took more than 180 s\n- mobilenet_v1 was not measured: not run\n" in text
    assert "chose their kernels beside other processes" in text


def test_goals_of_a_session_are_met_or_not(report: ModuleType) -> None:
    for figures, word in (((1.02, 12.0, 1.05), "met"), ((1.2, 30.0, 1.3), "NOT met")):
        text = report.report({"parts": [overhead(*figures)], "failed": {}})
        lines = [line for line in text.split("\n") if "(at most" in line]
        assert [line.rpartition(": ")[2] for line in lines] == [word] * 3


def test_parts_of_two_gpus_are_not_mixed(report: ModuleType, tmp_path: Path) -> None:
    other = part("lenet5")
    other["conditions"]["gpu"] = "NVIDIA Other"
    for document in (overhead(1, 1, 1), other):
        (tmp_path / f"{document['part']}.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="parts of several GPUs: NVIDIA Fake, NVIDIA Other"):
        report.read(tmp_path)
    with pytest.raises(SystemExit, match="no part in"):
        report.read(tmp_path / "empty")


def test_what_a_candidate_needs_is_made_first_and_what_tunes_is_marked(report: ModuleType, tmp_path: Path) -> None:
    setting = report.Setting(work=tmp_path, batches=(1, 8))
    jobs = {job.name: job for job in report.jobs_for(setting, ["resnet50", "lenet5"], ["aoti", "tensorrt"])}
    assert list(jobs)[:4] == ["export/resnet50", "tensorrt/resnet50/fp16", "tensorrt/resnet50/int8", "tensorrt/resnet50/fp32"]
    assert list(jobs)[4:8] == ["aoti/resnet50/fp16", "aoti/resnet50/fp32", "compile/resnet50/1", "compile/resnet50/8"]
    assert {name for name, job in jobs.items() if job.tunes} == {
        "autotune/resnet50/1", "autotune/resnet50/8", "aoti/resnet50/fp16/autotune", "tensorrt/resnet50/fp16", "tensorrt/resnet50/int8",
        "tensorrt/resnet50/fp32", "tensorrt/lenet5/fp16", "tensorrt/lenet5/int8",
    }  # fmt: skip
    assert {job.needs for name, job in jobs.items() if name.split("/")[1] == "lenet5"} == {None, "export/lenet5"}


def test_a_candidate_whose_job_failed_or_was_not_done_is_missing_with_the_reason(
    script: Script, report: ModuleType, tmp_path: Path
) -> None:
    jobs, setting = script("gpu_jobs"), report.Setting(work=tmp_path)
    (plain, *_) = script("gpu_candidates").COMPILE
    assert jobs.not_done(setting, plain, "lenet5", 8) == "compile/lenet5/8 was not done"
    jobs.keep_outcome(setting, "compile/lenet5/8", {"error": "no compiler"})
    assert jobs.not_done(setting, plain, "lenet5", 8) == "compile/lenet5/8: no compiler"
    jobs.keep_outcome(setting, "compile/lenet5/8", {"seconds": 2.0})
    assert jobs.not_done(setting, plain, "lenet5", 8) is None


SLEEP = 60 + os.getpid() / 1e7  # a number that no other process has in its command

CODES = {
    "good": "pass",
    "bad": "print('first'); raise SystemExit('the reason')",
    "slow": f"import subprocess; subprocess.run(['sleep', '{SLEEP}'])",
    "write": "import pathlib, sys, time; time.sleep(0.3)",
}


def do(report: ModuleType, tmp_path: Path, jobs: list[Any], **options: Any) -> tuple[dict[str, str], list[str]]:
    """Run jobs whose names begin with a key of CODES; what failed, and the names of `+begun` and `-ended` in order."""
    order: list[str] = []

    def start(job: Any) -> Any:
        order.append(job.name)
        code = CODES[job.name.rstrip("0123456789")]
        return report.Child.start(job.name, [sys.executable, "-S", "-c", code], tmp_path / f"{job.name}.txt", tunes=job.tunes)

    return report.run_jobs(jobs, start, **{"at_a_time": 2, "limit_s": 30.0, **options}), order


def test_jobs_wait_for_what_they_need_and_fail_with_it(report: ModuleType, tmp_path: Path) -> None:
    jobs = [
        report.Job(name="good2", needs="good1"),
        report.Job(name="good3", needs="bad1"),
        report.Job(name="good1"),
        report.Job(name="bad1"),
    ]
    failed, order = do(report, tmp_path, jobs)
    assert order == ["good1", "bad1", "good2"]
    assert failed == {"bad1": "the reason", "good3": "bad1 failed: the reason"}


def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(report: ModuleType, tmp_path: Path) -> None:
    start = time.monotonic()
    failed, _ = do(report, tmp_path, [report.Job(name="slow1"), report.Job(name="good1")], limit_s=1.0)
    assert failed == {"slow1": "it took more than 1 s"}
    failed, order = do(report, tmp_path, [report.Job(name=f"slow{n}") for n in (1, 2, 3)], until=time.monotonic() + 0.5)
    assert failed == dict.fromkeys(("slow1", "slow2", "slow3"), "the time to prepare was over")
    assert order == ["slow1", "slow2"]
    assert time.monotonic() - start < 20
    while sleeping():
        assert time.monotonic() - start < 40
        time.sleep(0.1)


def sleeping() -> bool:
    """Whether a process that `slow` started lives."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_text() == f"sleep\0{SLEEP}\0":
                return True
    return False


@pytest.mark.parametrize("together", [False, True])
def test_tuning_has_the_machine_alone_unless_it_may_not(report: ModuleType, tmp_path: Path, together: bool) -> None:
    running: list[Any] = []
    beside: list[int] = []

    def start(job: Any) -> Any:
        running[:] = [child for child in running if child.process.poll() is None]
        beside.append(len(running))
        child = report.Child.start(job.name, [sys.executable, "-S", "-c", CODES["write"]], tmp_path / job.name, tunes=job.tunes)
        running.append(child)
        return child

    jobs = [
        report.Job(name="a", tunes=True),
        report.Job(name="b"),
        report.Job(name="c", tunes=True),
        report.Job(name="d", tunes=True),
    ]
    assert report.run_jobs(jobs, start, at_a_time=4, limit_s=30.0, together=together) == {}
    if together:
        assert beside[:3] == [0, 1, 2]
        assert beside[3] < 3  # two tune at a time
    else:
        assert beside == [0, 0, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    with pytest.raises(SystemExit, match="no NVIDIA GPU that CUDA can use: nothing was measured"):
        report.main()
    assert list(tmp_path.iterdir()) == []


PLANTED = """
import os, signal, sys
sys.path.insert(0, BENCHMARKS)
import gpu_candidates, gpu_report

opened, command = gpu_candidates.Candidate.open, gpu_report.command

def crashes(self, *where):
    if self.label == "eager fp16":
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(self, *where)

gpu_candidates.Candidate.open = crashes
gpu_report.command = lambda *of: [sys.executable, __file__, *command(*of)[2:]]
gpu_report.main()
"""


def test_a_dry_run_goes_all_the_way_says_that_it_is_dry_and_a_crash_costs_one_candidate(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.replace("BENCHMARKS", repr(str(SCRIPT.parent))))
    command = [sys.executable, script, "--dry-run", "--part", "lenet5", "--only", "tensorrt-rtx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "None of these figures is of a GPU" in done.stdout
    assert "# PyTorch and what deploy makes of it on no GPU (dry run)" in done.stdout
    assert "lenet5: once more, without eager fp16\n" in done.stdout
    assert "| eager fp16, CUDA graph" in done.stdout
    assert "| eager fp16  " not in done.stdout
    assert re.search(
        r"^- eager fp16, batch 1; eager fp16, batch 2: it crashed \(SIGSEGV\), see .*-crash1\.txt$", done.stdout, re.M
    )
    assert "| tensorrt-rtx fp16, CUDA graph" in done.stdout
    assert "- resnet50 was not measured: not run\n" in done.stdout
    assert list(tmp_path.iterdir()) == [script]


def test_a_crash_outside_every_candidate_is_not_tried_again(script: Script, tmp_path: Path) -> None:
    crashes = script("gpu_crashes").Crashes(tmp_path, "lenet5")
    assert crashes.blame("it crashed") is None
    with crashes.watched("a"):
        pass
    with contextlib.suppress(ValueError), crashes.watched("b"):
        raise ValueError
    assert crashes.blame("it crashed") is None
    assert crashes.known() == {}


def test_candidates_come_by_value_and_those_that_tune_come_last(script: Script) -> None:
    labels = [each.label for each in script("gpu_candidates").candidates("resnet50", KINDS, autotune=True)]
    kinds = [label.split()[0].partition(":")[0] for label in labels if "max-autotune" not in label]
    assert list(dict.fromkeys(kinds)) == ["eager", "tensorrt", "tensorrt-rtx", "aoti", "compile", "onnxruntime"]
    assert ["max-autotune" in label for label in labels] == [False] * len(kinds) + [True] * (len(labels) - len(kinds))


def test_what_the_budget_has_no_time_for_is_said(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--dry-run", "--budget", "1"])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert str(ended.value.code).splitlines() == [f"{name}: the budget was spent" for name in ("overhead", "lenet5", "contexts")]
