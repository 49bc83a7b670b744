"""The whole acceptance on a GPU: engines of the reference architectures against PyTorch, in parts that can be resumed.

    python benchmarks/gpu_report.py                        every missing part, then the report
    python benchmarks/gpu_report.py --list                 the parts, and which have been measured
    python benchmarks/gpu_report.py --part lenet5-fp16     one part (may be repeated)
    python benchmarks/gpu_report.py --merge                the report of the measured parts
    python benchmarks/gpu_report.py --dry-run              a small run on the CPU: tests this script, measures nothing

Parts are files in --parts (build/gpu-report/parts) and take a few minutes each; the report goes to benchmarks/results/<date>-<gpu>.json
and .md. Weights and calibration data are random: this measures time and numeric error, not accuracy.
"""

import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_harness import Goal, bullets, conditions_here, make_parser, markdown, publish, shown_versions
from gpu_parts import CONTEXTS, MODELS, PRECISIONS, Setting, parts

from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.engine.cuda.driver import driver_version
from deploy.host.versions import versions
from deploy.words import count_of

BUILD = Path("build/gpu-report")
LONGEST_S = 480.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument(
        "--part", action="append", choices=list(parts()), metavar="NAME", help="measure this part, even if it has been measured"
    )
    parser.add_argument("--merge", action="store_true", help="write the report of the measured parts")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small, into a temporary folder")
    parser.add_argument("--parts", type=Path, default=BUILD / "parts", help="where parts are kept (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=BUILD / "work", help="where artifacts are built (default: %(default)s)")
    parser.add_argument("--flavour", default="auto", help="auto, tensorrt or tensorrt-rtx")
    parser.add_argument("--batches", default=None, metavar="1,8", help="other batch sizes than 1, 8, 32 and 128")
    args = parser.parse_args()
    if args.dry_run:
        return dry_run(args.part)
    if args.list:
        for name in parts():
            print(f"{name:<22} {'there' if (args.parts / f'{name}.json').is_file() else 'missing'}")
        return None
    if not args.merge:
        if not torch.cuda.is_available():
            sys.exit("no NVIDIA GPU that CUDA can use: nothing was measured (--dry-run tests this script without one)")
        sizes = {"batches": tuple(int(size) for size in args.batches.split(","))} if args.batches else {}
        setting = Setting(work=args.work, flavour=args.flavour, **sizes)
        missing = [name for name in parts() if not (args.parts / f"{name}.json").is_file()]
        failed = measure(args.part or missing, setting, args.parts)
        if failed:
            sys.exit(f"failed: {', '.join(failed)}; the others are kept, and the report can be written with --merge")
    measured = read(args.parts)
    publish(slug(measured[0]["conditions"]["gpu"]), {"schema": 1, "parts": measured}, report(measured), args.results)
    return None


def measure(names: Sequence[str], setting: Setting, folder: Path) -> list[str]:
    """Measure parts, a file for each, and return the names of those that failed; a failure is printed, and the others go on."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            figures = parts()[name](setting)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        seconds = time.perf_counter() - start
        document = {"part": name, "seconds": round(seconds, 1), "conditions": described(setting), **figures}
        (folder / f"{name}.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
        print(f"{name}: {seconds:.0f} s{'' if seconds <= LONGEST_S else ', longer than a part should take'}", flush=True)
    return failed


def described(setting: Setting) -> dict[str, Any]:
    gpu = "no GPU (dry run)" if setting.dry else torch.cuda.get_device_name()
    where = conditions_here(setting.device)
    libraries = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
    return where | {"gpu": gpu, "driver": driver_version(), "cuda": torch.version.cuda, "versions": versions(libraries)}


def read(folder: Path) -> list[dict[str, Any]]:
    """The parts that have been measured, in order. Exits when there are none, or when they come from several GPUs."""
    files = [folder / f"{name}.json" for name in parts()]
    measured = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    if not measured:
        sys.exit(f"no part in {folder}: measure one first")
    if len(gpus := {part["conditions"]["gpu"] for part in measured}) > 1:
        sys.exit(f"{folder} holds parts of several GPUs: {', '.join(sorted(gpus))}")
    return measured


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(measured: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown: the goals, then a table for each architecture."""
    where = measured[0]["conditions"]
    missing = [name for name in parts() if name not in {part["part"] for part in measured}]
    reached = [*goals(measured), *([f"not measured: {', '.join(missing)}"] if missing else [])]
    lines = [f"# Engines on {where['gpu']}\n", f"\n## Goals\n\n{bullets(reached)}"]
    for model in MODELS:
        engines_of_model = [part for part in measured if part.get("model") == model]
        if engines_of_model:
            lines.append(f"\n## {model}\n\n")
            lines.append(engines(engines_of_model))
            for part in engines_of_model:
                lines.append(f"\n{part['precision'].upper()}: milliseconds (p50), and how many times as fast the engine is\n\n")
                lines.append(speeds(part))
                lines += [f"\n{label} is missing: {reason}\n" for label, reason in part["missing"].items()]
    lines.append(
        f"\n{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, {where['cpu']}, {count_of(where['cores'], 'core')}; {shown_versions(where['versions'])};"
        f" {where['time']}.\nLatency: a run and the wait for it, from CUDA tensors unless it says numpy. GPU: by events around runs"
        " back to back.\nSpeed-up: the p50 of the other over that of the engine with its CUDA graph, in the same rounds, with its 95 %"
        " interval.\n"
    )
    return "".join(lines)


def goals(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measured figures beside their goals, in words; a goal that was not measured is listed as such."""
    by_part = {part["part"]: part for part in measured}
    lines = []
    over = by_part.get("overhead", {}).get("overhead")
    if over:
        lines += [str(goal) for goal in overhead_goals(over["resnet50, batch 8"], over["lenet5, batch 1"])]
    else:
        lines.append("what the session adds to the engine: not measured")
    row = next((row for row in by_part.get("resnet50-fp16", {}).get("rows", ()) if row["batch"] == 1), None)
    if row:
        for other, goal, text in (("eager fp16 channels_last", 2.0, "at least 2"), ("compile", 1.0, "more than 1")):
            faster = row["speedup"]["engine, CUDA graph"][other]["value"]
            text = f"resnet50, FP16, batch 1: {faster:.2f} times as fast as {other} ({text})"
            lines.append(str(Goal(text=text, met=faster >= goal)))
    else:
        lines.append("resnet50 in FP16 against PyTorch: not measured")
    for row in by_part.get("resnet50-autotune", {}).get("autotune", ()):
        faster = row["speedup"]
        lines.append(f"resnet50, FP16, batch {row['batch']}: {times(faster)} times as fast as torch.compile with max-autotune")
    return lines


def overhead_goals(large: Mapping[str, Any], small: Mapping[str, Any]) -> list[Goal]:
    """Of the part `overhead`: resnet50 at batch 8, and lenet5 at batch 1."""
    ratio, copied = large["session_over_bare"]["value"], large["numpy_over_copy_and_compute"]
    text = f"resnet50, batch 8: session.run takes {ratio:.3f} times the bare engine (at most 1.05)"
    reached = [Goal(text=text, met=ratio <= 1.05)]
    for label, key in (("session.run", "session_more_us"), ("with a CUDA graph, session.run", "graph_more_us")):
        text = f"lenet5: {label} takes {small[key]:.1f} µs more than the bare engine (at most 20)"
        reached.append(Goal(text=text, met=small[key] <= 20))
    text = f"resnet50, batch 8, from numpy: {copied:.2f} times copy and compute apart (at most 1.1)"
    return [*reached, Goal(text=text, met=copied <= 1.1)]


def engines(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for part in sorted(measured, key=lambda part: PRECISIONS.index(part["precision"])):
        share = ", ".join(f"{part['share'][name]:.0%} {name}" for name in COMPUTE_PRECISIONS if part["share"].get(name))
        worst = max(part["rows"], key=lambda row: row["parity"]["max_abs"])["parity"]
        built = f"{part['build_s']:.1f} s" if part["build_s"] is not None else "-"
        rows.append([part["precision"], part["flavour"], built, f"{part['engine_bytes'] / 1e6:.1f} MB", f"{share} ({part['share']['from']})", f"{worst['max_abs']:.2g}", f"{worst['cosine']:.5f}"])  # fmt: skip
    return markdown(["", "built with", "in", "size", "multiply-accumulates", "max abs off eager FP32", "cosine"], rows)


def speeds(part: Mapping[str, Any]) -> str:
    labels = [label for label in part["rows"][0]["latency_ms"] if not label.startswith("engine")]
    header = ["batch", "engine", "CUDA graph", "GPU", "from numpy", *labels, *(f"images/s, {count}" for count in CONTEXTS)]
    rows = []
    for row in part["rows"]:
        p50 = {label: times["p50"] for label, times in row["latency_ms"].items()}
        cells = [p50["engine"], p50["engine, CUDA graph"], row["gpu_ms"]["engine, CUDA graph"], p50["engine from numpy"]]
        against = [f"{p50[label]:.3f} ({times(row['speedup']['engine, CUDA graph'][label])})" for label in labels]
        rows.append([str(row["batch"]), *(f"{cell:.3f}" for cell in cells), *against, *(f"{value:,.0f}" for value in row["throughput"].values())])  # fmt: skip
    return markdown(header, rows)


def times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f}, {ratio['low']:.2f} to {ratio['high']:.2f}"


def dry_run(names: Sequence[str] | None) -> None:
    """Measure two small parts, or those in `names`, without a GPU; the report is printed, marked as a dry run, and not kept."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        small = {"batches": (1, 2), "rounds": 3, "slice_s": 0.01, "throughput_s": 0.05}
        setting = Setting(work=work / "work", dry=True, flavour="tensorrt-rtx", **small)
        if failed := measure(names or ["lenet5-fp32", "lenet5-int8"], setting, work / "parts"):
            sys.exit(f"failed: {', '.join(failed)}")
        print("A dry run: ONNX Runtime on the CPU in the place of every engine. None of these figures is of a GPU.\n")
        print(report(read(work / "parts")))


if __name__ == "__main__":
    main()
