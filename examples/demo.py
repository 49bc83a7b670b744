"""The whole path on real digits: data, training, ONNX, FP16, INT8, TensorRT engines, accuracy and speed, in one table.

    python examples/demo.py        (or `make demo`)

runs the commands that it prints, writes build/demo.md and build/demo.png, and fails when a net is less accurate than it
must be or loses accuracy in FP16 or INT8. Weights that are newer than the data and the programs are kept.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from deploy.words import count_of

HERE = Path(os.path.relpath(Path(__file__).parent))
BUILD = Path("build")
DIGITS = BUILD / "digits"
LEAST_TOP1 = {"lenet5": 96.0, "convnet": 97.0}
"""Per cent of the eval images that each net must get right."""
TRAINING = {
    "lenet5": ("--augment", "crop", "--area", 0.7, "--epochs", 7, "--batch-size", 64, "--lr", 4e-3),
    "convnet": ("--augment", "crop", "--area", 0.7, "--epochs", 7, "--batch-size", 64, "--lr", 2e-3),
}
"""Options of examples/finetune.py. A flipped digit would be no digit."""
MOST_LOST = {"fp16": 0.2, "int8": 0.5}
"""Points of top-1 that each precision may lose."""
BATCHES = (1, 32)
SHADES = ("#1f5fa8", "#9cc3ea")
"""Colours of the batch sizes."""
BENCH_S = 3
BACKENDS = {
    "eager": "PyTorch eager",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT engine",
    "tensorrt-rtx": "TensorRT-RTX engine",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a net in one precision on one backend. `bench` holds its results by batch size."""

    net: str
    runs_on: str
    precision: str
    top1: float | None
    size: int
    bench: dict[int, dict[str, Any]]


def main() -> None:
    start = time.perf_counter()
    python(HERE / "digits.py", "--output", DIGITS)
    rows = [row for net in LEAST_TOP1 for row in walk(net)]
    table = f"{markdown(rows)}\n{conditions()}\n"
    (BUILD / "demo.md").write_text(table, encoding="utf-8")
    draw(rows, BUILD / "demo.png")
    print(f"\n{table}\nbuild/demo.md, build/demo.png; {time.perf_counter() - start:.0f} s in all")
    if failed := failures(rows):
        sys.exit("\n".join(failed))


def walk(net: str) -> list[Row]:
    """Take one net the whole way: the rows of the table."""
    artifacts, engines = make(net, train(net))
    return [*measure(net, artifacts), *(engine_row(net, engine) for engine in engines)]


def train(net: str) -> Path:
    """Train a net, unless that was done with these data and programs, and return its weights. What was begun is gone on with."""
    run, sources = BUILD / "runs" / net, (HERE / "finetune.py", HERE / "pictures.py", HERE / "demo.py", DIGITS / "digits.json")
    kept = run / "last.pt"
    if kept.exists() and any(kept.stat().st_mtime < source.stat().st_mtime for source in sources):
        shutil.rmtree(run)
    python(HERE / "finetune.py", DIGITS, "--arch", net, *TRAINING[net], "--output", run, "--resume")
    return run / "best.pth"


def make(net: str, weights: Path) -> tuple[list[Path], list[Path]]:
    """The ONNX artifacts in FP32, FP16 and INT8, and the engines in FP16 and INT8."""
    fp32, fp16, int8 = artifacts = [BUILD / net, BUILD / f"{net}-fp16", BUILD / f"{net}-int8"]
    engines = [BUILD / f"{net}-fp16-trt", BUILD / f"{net}-int8-fp16-trt"]
    classes, calib, held = DIGITS / "classes.txt", DIGITS / "calib", DIGITS / "eval"
    deploy("export", "--arch", net, "--weights", weights, "--preprocess", "mnist", "--classes", classes, "-o", fp32)
    deploy("convert", fp32, "--fp16", "--data", calib, "-o", fp16)
    deploy("quantize", fp32, "--calib", calib, "--eval", held, "--max-drop", MOST_LOST["int8"], "-o", int8)
    deploy("build-trt", fp32, "--fp16", "-o", engines[0])
    deploy("build-trt", fp32, "--int8", "--fp16", "--calib", calib, "-o", engines[1])
    return artifacts, engines


def measure(net: str, artifacts: list[Path]) -> list[Row]:
    """Benchmark the artifacts on every backend, their accuracy too."""
    timings, report = BUILD / f"{net}-bench.json", BUILD / f"{net}-report.html"
    options = ("--batch", ",".join(map(str, BATCHES)), "--seconds", BENCH_S, "--eval", DIGITS / "eval")
    deploy("bench", *artifacts, *options, "--json", timings, "--report", report)
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for result in json.loads(timings.read_text())["results"]:
        results.setdefault((result["artifact"], result["backend"]), {})[result["batch"]] = result
    rows = []
    for (_, backend), bench in results.items():
        first = next(iter(bench.values()))
        rows.append(
            Row(net=net, runs_on=backend, precision=first["precision"], top1=first["top1"], size=first["size_bytes"], bench=bench)
        )
    return rows


def engine_row(net: str, engine: Path) -> Row:
    """An engine with its precision share; it is not timed, for that needs a GPU."""
    manifest = deploy_json("inspect", engine)
    share = manifest["precision_share"]
    parts = [f"{100 * share[name]:.0f} % {name}" for name in ("int8", "fp16", "bf16", "tf32", "fp32") if share[name] >= 0.005]
    precision = f"{', '.join(parts)} ({share['from']})"
    flavour = manifest["target"]["flavour"]
    return Row(net=net, runs_on=flavour, precision=precision, top1=None, size=manifest["files"]["engine.plan"]["bytes"], bench={})


def failures(rows: list[Row]) -> list[str]:
    """The rows that are less accurate than they must be, in words."""
    failed = []
    full = {(row.net, row.runs_on): row.top1 for row in rows if row.precision == "fp32"}
    for row in rows:
        name = f"{row.net} in {row.precision} on {row.runs_on}"
        if row.top1 is None:
            continue
        if row.top1 < LEAST_TOP1[row.net]:
            failed.append(f"{name}: top-1 is {row.top1:.2f} %; at least {LEAST_TOP1[row.net]:g} % is expected")
        before = full.get((row.net, row.runs_on))
        most = MOST_LOST.get(row.precision, 0)
        if before is not None and before - row.top1 > most:
            failed.append(f"{name}: top-1 fell from {before:.2f} % to {row.top1:.2f} %; at most {most} points may be lost")
    return failed


def markdown(rows: list[Row]) -> str:
    """The table in Markdown, aligned, so that it is readable as plain text too."""
    head = ["model", "runs on", "precision", "top-1", "size"]
    for batch in BATCHES:
        head += [f"batch {batch}: p50", "images/s", "speed-up"]
    cells = [head]
    for row in rows:
        line = [row.net, BACKENDS.get(row.runs_on, row.runs_on), row.precision]
        line += ["-" if row.top1 is None else f"{row.top1:.1f} %", f"{row.size / 1e3:,.0f} kB"]
        for batch in BATCHES:
            if batch in row.bench:
                result = row.bench[batch]
                spread = f" ({result['speedup_low']:.1f} to {result['speedup_high']:.1f})" if row.runs_on != "eager" else ""
                speed_up = f"{result['speedup']:.1f}{spread}" if result["certain"] else "uncertain"
                line += [f"{result['p50_ms']:.3g} ms", f"{result['images_per_s']:,.0f}", speed_up]
            else:
                line += ["needs a GPU" if row.top1 is None else "-", "-", "-"]
        cells.append(line)
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    left = 3  # columns of words; the rest are numbers
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in cells
    ]
    rule = "| " + " | ".join("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def conditions() -> str:
    """What the figures mean, and what they were measured on: the versions are those of what is installed."""
    documents = [json.loads((BUILD / f"{net}-bench.json").read_text()) for net in LEAST_TOP1]
    known = [document["conditions"] for document in documents]
    reasons = {row["uncertain_because"] for document in documents for row in document["results"] if not row["certain"]}
    doubt = f"\nUncertain: {'; '.join(sorted(reasons))}. Run it again on a quieter machine." if reasons else ""
    versions = ", ".join(f"{name} {version}" for name, version in known[0]["versions"].items() if version)
    return (
        "Top-1 on 1,000 real digits kept out of training. p50: median latency of a batch; speed-up: over eager PyTorch in the"
        " same rounds, with its 95 % interval. Engines: share of the multiply-accumulates in each precision, as read from the engine or from its typed network."
        f"\n{known[0]['cpu']}, {count_of(known[0]['threads'], 'thread')}; load average"
        f" {' and '.join(str(entry['load_average'][0]) for entry in known)} before the two benchmarks; {versions}.{doubt}"
    )


def draw(rows: list[Row], path: Path) -> None:
    """A picture 1000 pixels wide: speed-up over eager with its spread, and accuracy, net by net."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"})
    timed = {net: [row for row in rows if row.net == net and row.bench] for net in LEAST_TOP1}
    heights = [len(lines) for lines in timed.values()]
    figure, grid = plt.subplots(
        len(timed), 2, figsize=(10, 1.2 + 0.62 * sum(heights)), dpi=100, squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [3, 1.15], "height_ratios": heights},
    )  # fmt: skip
    for (speed, accuracy), (net, lines) in zip(grid, timed.items(), strict=True):
        draw_speed(speed, net, lines)
        draw_accuracy(accuracy, net, lines)
        accuracy.set_ylim(speed.get_ylim()[::-1])
        accuracy.invert_yaxis()
    grid[0][0].legend(loc="upper right", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_speed(axes: Any, net: str, rows: list[Row]) -> None:
    """Bars of the speed-ups, one for each row and batch size."""
    places = range(len(rows))
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    limit = 1.5 * max([1.0, *(each["speedup"] for row in rows for each in row.bench.values() if each["certain"])])
    for index, (batch, colour) in enumerate(zip(BATCHES, SHADES, strict=True)):
        bars = [(place + (index - 0.5) * 0.38, row.bench[batch]) for place, row in zip(places, rows, strict=True)]
        known = [(y, result) for y, result in bars if result["certain"]]
        spread = [
            [result["speedup"] - result["speedup_low"] for _, result in known],
            [result["speedup_high"] - result["speedup"] for _, result in known],
        ]
        axes.barh(
            [y for y, _ in known], [result["speedup"] for _, result in known], 0.36, color=colour, xerr=spread,
            error_kw={"elinewidth": 1, "capsize": 2}, label=f"batch {batch}",
        )  # fmt: skip
        for y, result in bars:
            text, end = (f"{result['speedup']:.1f}x", result["speedup_high"]) if result["certain"] else ("uncertain", 0.0)
            end = min(end, 0.9 * limit)  # a spread that is wider than the picture runs out of it; the table has its figures
            axes.annotate(text, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9, bbox=behind)
    axes.axvline(1, color="#888888", linewidth=1, linestyle=":")
    axes.set_yticks(places, [f"{BACKENDS.get(row.runs_on, row.runs_on)}, {row.precision.upper()}" for row in rows])
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_title(f"{net}: speed-up over eager PyTorch, with spread", loc="left", fontsize=11)


def draw_accuracy(axes: Any, net: str, rows: list[Row]) -> None:
    """Dots of the top-1 accuracies, beside the bars, and a line at the least that the net must reach."""
    places = range(len(rows))
    axes.plot([row.top1 for row in rows], places, "o", markersize=9, color="#2f7d46", clip_on=False)
    for y, row in zip(places, rows, strict=True):
        axes.text((row.top1 or 0) - 0.2, y, f"{row.top1:.1f} %", va="center", ha="right", fontsize=9)
    axes.axvline(LEAST_TOP1[net], color="#b03030", linewidth=1, linestyle="--")
    axes.set_xlim(min(95.0, *(row.top1 or 0 for row in rows)), 100)
    axes.set_yticks([])
    axes.set_title(f"top-1 (at least {LEAST_TOP1[net]:g} %)", loc="left", fontsize=11)


def python(*arguments: object) -> None:
    run([sys.executable], "python", arguments)


def deploy(*arguments: object) -> None:
    run([command()], "deploy", arguments)


def deploy_json(*arguments: object) -> Any:
    """The document that the command prints with --json."""
    return json.loads(run([command()], "deploy", (*arguments, "--json"), capture=True))


def command() -> str:
    """The `deploy` of the environment that runs this program."""
    beside = Path(sys.executable).with_name("deploy")
    program = str(beside) if beside.exists() else shutil.which("deploy")
    if program is None:
        sys.exit("the command deploy is not installed: pip install -e '.[demo]'")
    return program


def run(program: list[str], shown: str, arguments: tuple[object, ...], capture: bool = False) -> str:
    """Print the command and run it; end the demo where it fails. Returns its output if `capture`."""
    words = [str(argument) for argument in arguments]
    print(f"$ {' '.join([shown, *words])}", flush=True)
    done = subprocess.run([*program, *words], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(f"the command failed with exit status {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
