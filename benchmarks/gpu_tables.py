"""The report of `gpu_report.py` as Markdown, from the documents of its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench_harness import Goal, bullets, markdown, shown_versions

from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.words import count_of

Part = Mapping[str, Any]
TITLES = {"tensors": "From CUDA tensors", "numpy": "From numpy, through pinned memory, to numpy"}


def report(measured: Sequence[Part], missing: Mapping[str, str]) -> str:
    """The headlines and goals, then the tables of each part. missing: why the parts that were not measured were not, by name."""
    where = measured[0]["conditions"]
    lines = [f"# PyTorch and what deploy makes of it on {where['gpu']}\n"]
    lines.append(f"\n## Headline\n\n{bullets([*headlines(measured), *goals(measured)])}")
    if missing:
        lines.append(bullets(f"{name} was not measured: {reason}" for name, reason in missing.items()))
    for part in measured:
        if "rows" in part:
            lines.append(model_tables(part))
        elif "overhead" in part:
            lines.append(f"\n## What a session adds\n\n{overhead_table(part)}{lacking_lines(part)}")
        elif part.get("contexts"):
            lines.append(f"\n## Several contexts\n\nImages a second.\n\n{contexts_table(part)}{lacking_lines(part)}")
    return "".join([*lines, "\n", conditions_text(measured)])


def model_tables(part: Part) -> str:
    """The tables of one model: latencies in both modes, then what is near them."""
    lines = [f"\n## {part['model']}\n"]
    for mode, title in TITLES.items():
        baselines = "; ".join(f"batch {row['batch']}: {row[mode]['baseline']}" for row in part["rows"])
        lines.append(f"\n{title}: p50 in milliseconds (times as fast as the strongest eager: {baselines})\n\n")
        lines.append(latency_table(part["rows"], mode))
    lines.append(
        "\nThe GPU's share of a run in milliseconds, by events around runs back to back, and the difference to eager in FP32\n\n"
    )
    lines.append(gpu_table(part["rows"]))
    if part["engines"]:
        lines.append(f"\nWhat was built\n\n{built_table(part['engines'])}")
    return "".join([*lines, lacking_lines(part)])


def latency_table(rows: Sequence[Mapping[str, Any]], mode: str) -> str:
    labels = dict.fromkeys(label for row in rows for label in row[mode]["latency_ms"])
    return markdown(
        ["", *(f"batch {row['batch']}" for row in rows)],
        [[label, *(latency_cell(row[mode], label) for row in rows)] for label in labels],
    )


def latency_cell(figures: Mapping[str, Any], label: str) -> str:
    if label not in figures["latency_ms"]:
        return "-"
    p50 = figures["latency_ms"][label]["p50"]
    if label == figures["baseline"]:
        return f"{p50:.3f} (baseline)"
    return f"{p50:.3f} ({times(figures['speedup'][label])})"


def gpu_table(rows: Sequence[Mapping[str, Any]]) -> str:
    labels = dict.fromkeys(label for row in rows for label in row["gpu_ms"])
    lines = []
    for label in labels:
        gpu = [f"{row['gpu_ms'][label]:.3f}" if label in row["gpu_ms"] else "-" for row in rows]
        off = [row["parity"][label] for row in rows if row["parity"].get(label)]
        worst = f"{max(each['max_abs'] for each in off):.2g}" if off else "-"
        lines.append([label, *gpu, worst, f"{min(each['cosine'] for each in off):.6f}" if off else "-"])
    return markdown(["", *(f"batch {row['batch']}" for row in rows), "max abs", "cosine"], lines)


def built_table(engines: Mapping[str, Any]) -> str:
    rows = []
    for label, engine in engines.items():
        share = engine["share"]
        named = [f"{share[name]:.0%} {name}" for name in COMPUTE_PRECISIONS if share.get(name)] if share else []
        said = f"{', '.join(named)} ({share['from']}{_covered(share)})" if share else "-"
        rows.append([label, f"{engine['seconds']:.1f} s", f"{engine['bytes'] / 1e6:.1f} MB", said])
    return markdown(["", "in", "size", "multiply-accumulates"], rows)


def _covered(share: Mapping[str, Any]) -> str:
    return f", {share['coverage']:.0%} of them" if share.get("coverage") is not None else ""


def overhead_table(part: Part) -> str:
    rows = [
        [
            f"{row['label']}, {row['model']}, batch {row['batch']}",
            f"{row['p50_ms']['bare']:.3f} ms",
            f"{row['p50_ms']['session']:.3f} ms",
            f"{row['own_us']:.1f} µs",
            times(row["session_over_bare"]),
            f"{row['numpy_over_copy_and_compute']:.2f}",
        ]
        for row in part["overhead"]
    ]
    header = ["", "bare", "session", "own time", "session over bare", "from numpy over copies and bare"]
    return markdown(header, rows)


def contexts_table(part: Part) -> str:
    counts = list(part["contexts"][0]["images_per_s"])
    rows = [
        [f"{row['label']}, {row['model']}, batch {row['batch']}", *(f"{row['images_per_s'][count]:,.0f}" for count in counts)]
        for row in part["contexts"]
    ]
    return markdown(["", *(f"{count} at a time" for count in counts)], rows)


def lacking_lines(part: Part) -> str:
    """What the tables lack, and why: a line for each reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in part["missing"].items():
        labels.setdefault(reason, []).append(label)
    lines = bullets(f"{'; '.join(each)}: {reason}" for reason, each in labels.items())
    return f"\nMissing:\n\n{lines}" if lines else ""


def headlines(measured: Sequence[Part]) -> list[str]:
    """For each model and batch, the strongest eager, and against it torch.compile at its best and the best of the others."""
    lines = []
    for part in measured:
        for row in part.get("rows", ()):
            figures = row["tensors"]
            p50 = {label: each["p50"] for label, each in figures["latency_ms"].items()}
            baseline = figures["baseline"]
            sides = [f"{part['model']}, batch {row['batch']}: the strongest eager, {baseline}, takes {p50[baseline]:.3f} ms"]
            for prefix, other in (("compile", False), (("eager", "compile"), True)):
                labels = [label for label in p50 if label.startswith(prefix) != other]
                if labels:
                    best = min(labels, key=lambda label: p50[label])
                    sides.append(f"{best} {p50[best]:.3f} ms ({times(figures['speedup'][best])} times as fast)")
            lines.append("; ".join(sides))
    return lines


def goals(measured: Sequence[Part]) -> list[Goal]:
    """What a session may add: 20 µs to lenet5, 5 % to resnet50, and 10 % to the copies from numpy."""
    found = []
    for row in (row for part in measured for row in part.get("overhead", ())):
        what = f"{row['label']}, {row['model']}, batch {row['batch']}"
        if row["model"] == "lenet5":
            found.append(Goal(text=f"{what}: the session adds {row['own_us']:.1f} µs (at most 20)", met=row["own_us"] <= 20))
        else:
            slower, copied = row["session_over_bare"]["value"], row["numpy_over_copy_and_compute"]
            found.append(
                Goal(text=f"{what}: the session takes {slower:.3f} times the bare run (at most 1.05)", met=slower <= 1.05)
            )
            found.append(
                Goal(text=f"{what}, from numpy: {copied:.2f} times copies and run apart (at most 1.1)", met=copied <= 1.1)
            )
    return found


def conditions_text(measured: Sequence[Part]) -> str:
    where = measured[0]["conditions"]
    tuned = " beside other processes" if where["tuned_together"] else " while nothing else ran"
    return (
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, {where['cpu']}, {count_of(where['cores'], 'core')};"
        f" {shown_versions(where['versions'])}; {where['time']}.\nLatency: a run on a stream of its own and the wait for it. Candidates take turns, in an"
        " order that rotates, all on the same input.\nThe strongest eager is the one with the least p50 at that batch; a speed-up is its p50 over"
        " the other's in the same rounds, with its 95 %\ninterval. FP16 of eager and torch.compile is in channels_last, with cuDNN's search for the fastest"
        " convolution on; shapes are static\n(`dynamic=False`). TF32 is off unless the line says so. max-autotune and engines chose their kernels"
        f"{tuned}.\nWeights are random: this measures time and numeric error, not accuracy.\n"
    )


def times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f}, {ratio['low']:.2f} to {ratio['high']:.2f}"
