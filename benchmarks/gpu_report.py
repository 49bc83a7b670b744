"""PyTorch in all its ways, and what deploy makes of the same models, on one GPU: tables of whatever is there.

    python benchmarks/gpu_report.py                        every missing part, then the report
    python benchmarks/gpu_report.py --list                 the parts, and which have been measured
    python benchmarks/gpu_report.py --part resnet50        one part (may be repeated)
    python benchmarks/gpu_report.py --budget 290           the most valuable first, until the time is over
    python benchmarks/gpu_report.py --merge                the report of the measured parts
    python benchmarks/gpu_report.py --dry-run              a small run on the CPU: tests this script, measures nothing

It needs torch with CUDA; AOTInductor, ONNX Runtime's CUDA provider, TensorRT and TensorRT-RTX are measured where they are
there, and what is missing is said. Exports, compilations and builds are made first, many at a time; then one part after the other
is measured, alone, in a process of its own. What was made and measured is kept in build/gpu-report: a run that was cut off
continues. The report goes to benchmarks/results/<date>-<gpu>.json and .md.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_harness import conditions_here, encode, make_parser, save
from gpu_candidates import KINDS, lacking
from gpu_crashes import Crashes
from gpu_jobs import Child, Job, compile_threads, do_job, environment, jobs_for, keep_outcome, outcome, run_jobs
from gpu_measure import measure
from gpu_overhead import contexts, overhead
from gpu_setting import BATCHES, Setting
from gpu_tables import report as tables

from deploy.engine.cuda.driver import driver_version
from deploy.host.cpu import usable_cores
from deploy.host.versions import versions

BUILD = Path("build/gpu-report")
MODELS = ("resnet50", "mobilenet_v1", "resnet34", "vit_b_16", "lenet5")
WAVES = (("resnet50", "overhead"), ("mobilenet_v1", "resnet34"), ("vit_b_16", "lenet5", "contexts"))
"""The parts, the most valuable first: the tables of the models, and two more. Those of a wave are prepared together."""
PARTS = tuple(name for wave in WAVES for name in wave)
PART_S = 180.0
"""The longest that a part may take to be measured, in seconds."""
JOB_S = 600.0
LEAST_S = 15.0
"""A part is not begun with less time left, in seconds."""
PREPARING = 0.55
"""The share of what is left of a budget in which a wave is prepared."""

Figures = Iterator[dict[str, Any]]


def main() -> None:
    args = parse()
    setting = setting_of(args)
    if args.list:
        for name in PARTS:
            print(f"{name:<14} {'there' if part_file(args, name).is_file() else 'missing'}")
        return
    if args.job:
        sys.exit(job(setting, args.job))
    if args.measure:
        sys.exit(measured_part(args, setting, args.measure))
    if args.dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            args.work, args.parts, args.results = (Path(temporary) / name for name in ("work", "parts", "results"))
            print(
                "A dry run: eager and ONNX Runtime on the CPU in the place of what needs a GPU. None of these figures is of a GPU.\n"
            )
            run(args, setting_of(args), args.part or ("lenet5", "overhead", "contexts"))
        return
    if not args.merge and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that CUDA can use: nothing was measured (--dry-run tests this script without one)")
    missing = [name for name in PARTS if not part_file(args, name).is_file()]
    run(args, setting, () if args.merge else args.part or missing)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument(
        "--part", action="append", choices=PARTS, metavar="NAME", help="measure this part, even if it has been measured"
    )
    parser.add_argument("--merge", action="store_true", help="write the report of the measured parts")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small, into a temporary folder")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end after this time with what is there by then")
    parser.add_argument("--together", action="store_true", help="tune beside other processes: quicker, but tuning is disturbed")
    parser.add_argument("--only", metavar="KIND,...", help=f"beside PyTorch, only these of {', '.join(KINDS)} ('' for none)")
    parser.add_argument("--no-autotune", action="store_true", help="without torch's max-autotune, which takes minutes")
    parser.add_argument("--jobs", type=int, default=max(1, usable_cores() - 1), help="at a time (default: %(default)s)")
    parser.add_argument("--parts", type=Path, default=BUILD / "parts", help="where parts are kept (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=BUILD / "work", help="where artifacts are built (default: %(default)s)")
    parser.add_argument(
        "--batches", default=",".join(map(str, BATCHES)), metavar="SIZE,...", help="batch sizes (default: %(default)s)"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def setting_of(args: argparse.Namespace) -> Setting:
    kinds = frozenset(filter(None, args.only.split(","))) if args.only is not None else None
    if unknown := (kinds or frozenset()) - set(KINDS):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; expected {', '.join(KINDS)}")
    if args.dry_run:
        return Setting(work=args.work, kinds=kinds, dry=True, batches=(1, 2), rounds=2, slice_s=0.001, throughput_s=0.01)
    batches = tuple(int(size) for size in args.batches.split(","))
    return Setting(work=args.work, kinds=kinds, autotune=not args.no_autotune, batches=batches)


def run(args: argparse.Namespace, setting: Setting, names: Sequence[str]) -> None:
    """Prepare and measure parts, and write the report after each. Exits with what failed when a part did."""
    until = time.monotonic() + args.budget if args.budget else None
    failed: dict[str, str] = {}
    for wave in WAVES:
        if wanted := [name for name in wave if name in names]:
            left = until - time.monotonic() if until else None
            if left is None or left >= LEAST_S:
                prepare(args, setting, wanted, time.monotonic() + left * PREPARING if left else None)
            for name in wanted:
                if reason := measure_part(args, setting, name, until):
                    failed[name] = reason
    if not failed or any(part_file(args, name).is_file() for name in PARTS):
        print(publish(args, failed))
    if failed:
        sys.exit("".join(f"{name}: {reason}\n" for name, reason in failed.items()).rstrip())


def measure_part(args: argparse.Namespace, setting: Setting, name: str, until: float | None) -> str | None:
    """Measure a part in a process of its own, and write the report; what went wrong, or None.

    A candidate that ends the process is left out, and the rest is measured again.
    """
    crashes = Crashes(setting.work, name)
    crashes.clear()
    part_file(args, name).unlink(missing_ok=True)
    log = setting.work / "logs" / f"measure-{name}.txt"
    while True:
        left = until - time.monotonic() if until else PART_S
        if left < LEAST_S:
            return "the budget was spent"
        print(f"{name} ...", flush=True)
        child = Child.start(name, command(args, "--measure", name), log, environment(setting, 2))
        reason = child.wait(min(PART_S, left))
        print(f"{name}: {time.monotonic() - child.started:.0f} s{f', {reason}' if reason else ''}", flush=True)
        if not child.crashed or (label := crashes.blame(kept_log(child, log, crashes))) is None:
            break
        print(f"{name}: once more, without {label}", flush=True)
    if part_file(args, name).is_file():
        publish(args, {name: reason} if reason else {})
    return reason


def kept_log(child: Child, log: Path, crashes: Crashes) -> str:
    """Why a process crashed; its log is kept beside the one of the next try."""
    kept = log.replace(log.with_stem(f"{log.stem}-crash{len(crashes.known()) + 1}"))
    return child.reason().replace(str(log), str(kept))


def prepare(args: argparse.Namespace, setting: Setting, names: Sequence[str], until: float | None) -> None:
    """Do the jobs of parts that have not been done; the reasons of those that failed are kept for the tables."""
    absent = lacking(setting)
    kinds = [kind for kind in KINDS if kind not in absent]
    wanted = ["lenet5"] if setting.dry else [model for model in MODELS if model in names or needs_model(model, names)]
    jobs = [job for job in jobs_for(setting, wanted, kinds) if not setting.dry or job.name.startswith(("export/", "fp16/"))]
    jobs = [job for job in jobs if "seconds" not in (outcome(setting, job.name) or {})]

    def start(job: Job) -> Child:
        log = setting.work / "logs" / f"{job.name.replace('/', '-')}.txt"
        return Child.start(
            job.name, command(args, "--job", job.name), log, environment(setting, compile_threads(job)), tunes=job.tunes
        )

    print(f"{len(jobs)} jobs, {args.jobs} at a time ...", flush=True)
    began = time.monotonic()
    failed = run_jobs(jobs, start, at_a_time=args.jobs, limit_s=JOB_S, until=until, together=args.together)
    for name, reason in failed.items():
        keep_outcome(setting, name, {"error": reason})
        print(f"{name}: {reason}", flush=True)
    print(f"prepared: {time.monotonic() - began:.0f} s", flush=True)


def needs_model(model: str, names: Sequence[str]) -> bool:
    return ("overhead" in names and model in ("lenet5", "resnet50")) or ("contexts" in names and model == "resnet50")


def command(args: argparse.Namespace, *more: str) -> list[str]:
    """This script with the same setting."""
    found = [sys.executable, str(Path(__file__).resolve()), "--work", str(args.work), "--parts", str(args.parts), *more]
    found += ["--dry-run"] * args.dry_run + ["--together"] * args.together + ["--no-autotune"] * args.no_autotune
    for option, value in (("--only", args.only), ("--batches", args.batches)):
        found += [option, value] if value is not None else []
    return found


def job(setting: Setting, name: str) -> int:
    """Do a job in this process; its exit status. The last line that it prints says what went wrong."""
    try:
        keep_outcome(setting, name, do_job(setting, name))
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], flush=True)
        return 1
    return 0


def measured_part(args: argparse.Namespace, setting: Setting, name: str) -> int:
    """Measure a part in this process, and keep what there is after every step; its exit status."""
    more: dict[str, Callable[[Setting], Figures]] = {"overhead": overhead, "contexts": contexts}
    start = time.perf_counter()
    conditions = described(setting, tuned_together=args.together)
    args.parts.mkdir(parents=True, exist_ok=True)
    try:
        for figures in more[name](setting) if name in more else measure(setting, name):
            document = {"part": name, "seconds": round(time.perf_counter() - start, 1), "conditions": conditions, **figures}
            new = part_file(args, name).with_suffix(".new")
            new.write_text(encode(document), encoding="utf-8")
            new.replace(part_file(args, name))
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], flush=True)
        return 1
    return 0


def described(setting: Setting, *, tuned_together: bool) -> dict[str, Any]:
    where = conditions_here(setting.device)
    return where | {
        "state": where["gpu"],
        "gpu": "no GPU (dry run)" if setting.dry else torch.cuda.get_device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": versions(("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")),
        "tuned_together": tuned_together,
    }


def part_file(args: argparse.Namespace, name: str) -> Path:
    path: Path = args.parts / f"{name}.json"
    return path


def publish(args: argparse.Namespace, failed: Mapping[str, str]) -> str:
    """Write the report of the measured parts, and return its text."""
    measured = read(args.parts)
    document = {"schema": 2, "parts": measured, "failed": dict(failed)}
    text = report(document)
    where = save(slug(measured[0]["conditions"]["gpu"]), document, text, args.results)
    return f"{text}\nwritten: {where}.json and .md"


def read(folder: Path) -> list[dict[str, Any]]:
    """The parts that have been measured, in order. Exits when there are none, or when they come from several GPUs."""
    files = [folder / f"{name}.json" for name in PARTS]
    measured = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    if not measured:
        sys.exit(f"no part in {folder}: measure one first")
    if len(gpus := {part["conditions"]["gpu"] for part in measured}) > 1:
        sys.exit(f"{folder} holds parts of several GPUs: {', '.join(sorted(gpus))}")
    return measured


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    measured = {part["part"] for part in document["parts"]}
    missing = {name: document["failed"].get(name, "not run") for name in PARTS if name not in measured}
    return tables(document["parts"], missing)


if __name__ == "__main__":
    main()
