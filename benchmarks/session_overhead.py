"""What `Session.run` adds to onnxruntime's own `InferenceSession.run`: lenet5, batch 1. Goal: at most 1.25 times.

    python benchmarks/session_overhead.py [--out FILE.json]

The three candidates take turns in one process, in blocks with a pause between them, so that threads of one that still
spin do not slow down the next: the session, onnxruntime with the same settings, and onnxruntime as it comes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

import deploy
from deploy.bench.conditions import conditions, usable_cores
from deploy.runtime.onnxruntime import SPIN_US
from deploy.timing import latency, paired_ratio, sample

GOAL = 1.25
ROUNDS = 30
RUNS = 300
PAUSE_S = 0.08


def raw(path: Path, *, same_settings: bool) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    if same_settings:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, list[list[float]]]:
    """Microseconds of every run, by candidate and round."""
    found: dict[str, list[list[float]]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE_S)
            sample(candidates[name], 1.0, RUNS // 10)
            found[name].append([value * 1e6 for value in sample(candidates[name], 1.0, RUNS)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        artifact = deploy.export(Path(folder) / "lenet5", arch="lenet5")
        session = deploy.load(artifact, "onnxruntime")
        same, plain = (raw(artifact.onnx_path, same_settings=same) for same in (True, False))
        (spec,), (result,) = session.inputs, session.outputs
        feed = {spec.name: np.random.default_rng(0).standard_normal(spec.concrete({"batch": 1}), dtype=np.float32)}
        found = measure(
            {
                "session.run": lambda: session.run(feed),
                "InferenceSession.run, same settings": lambda: same.run([result.name], feed),
                "InferenceSession.run, default settings": lambda: plain.run([result.name], feed),
            }
        )
    ours = found["session.run"]
    rows = []
    print(f"{'lenet5, batch 1':40} {'p50 µs':>8} {'p90 µs':>8} {'session / raw':>14}")
    for name, rounds in found.items():
        times = latency([value for each in rounds for value in each])
        # How many times faster the raw run is than ours is how many times longer ours takes.
        ratio = paired_ratio(ours, rounds)
        rows.append({"name": name, "p50_us": times.p50, "p90_us": times.p90, "ratio": ratio.value})
        shown = "" if rounds is ours else f"{ratio.value:.3f}"
        print(f"{name:40} {times.p50:8.2f} {times.p90:8.2f} {shown:>14}")
    worst = max(row["ratio"] for row in rows)
    print(f"ratio {worst:.3f} (goal: at most {GOAL}): {'met' if worst <= GOAL else 'NOT met'}")
    if out is not None:
        document = {"conditions": conditions(threads=usable_cores(), device="cpu"), "goal": GOAL, "results": rows}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
