"""What `Session.run` adds to onnxruntime's own `InferenceSession.run`: lenet5, batch 1. Goal: at most 1.25 times.

    python benchmarks/session_overhead.py [--out FILE.json]

All in one process. The session takes turns, run by run, with the very InferenceSession that is inside it; and, block by
block, with an InferenceSession as onnxruntime opens it by default, after pauses in which its threads stop spinning.
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
from deploy.bench.conditions import conditions
from deploy.evidence.timing import latency, paired_ratio, sample
from deploy.host.cpu import usable_cores

GOAL = 1.25
ROUNDS = 40
RUNS = 250
PAUSE_S = 0.08

Run = Callable[[], object]


def alternate(first: Run, second: Run) -> tuple[list[float], list[float]]:
    """Microseconds of RUNS runs of each, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for run, found in zip((first, second), times, strict=True):
            found += [value * 1e6 for value in sample(run, 0.0)]
    return times


def block(run: Run) -> list[float]:
    time.sleep(PAUSE_S)
    sample(run, 1.0, RUNS // 10)
    return [value * 1e6 for value in sample(run, 1.0, RUNS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        artifact = deploy.export(Path(folder) / "lenet5", arch="lenet5")
        session = deploy.load(artifact, "onnxruntime")
        plain = onnxruntime.InferenceSession(str(artifact.onnx_path), providers=["CPUExecutionProvider"])
    (spec,), (result,) = session.inputs, session.outputs
    feed = {spec.name: np.random.default_rng(0).standard_normal(spec.concrete({"batch": 1}), dtype=np.float32)}
    inner = session._session  # type: ignore[attr-defined]

    def ours() -> object:
        return session.run(feed)

    # By round: the session and the raw run that it is compared with.
    pairs: dict[str, list[tuple[list[float], list[float]]]] = {
        "the InferenceSession inside": [],
        "InferenceSession by default": [],
    }
    inside, default = pairs.values()
    for turn in range(ROUNDS):
        time.sleep(PAUSE_S)
        if turn % 2:
            inside.append(alternate(ours, lambda: inner.run([result.name], feed)))
        else:
            inside.append(alternate(lambda: inner.run([result.name], feed), ours)[::-1])
        default.append((block(ours), block(lambda: plain.run([result.name], feed))))
    rows = []
    print(f"{'lenet5, batch 1: session.run against':38} {'session p50':>12} {'raw p50':>9} {'ratio':>6}")
    for name, rounds in pairs.items():
        mine, raw = ([each[side] for each in rounds] for side in (0, 1))
        medians = [latency([value for each in side for value in each]).p50 for side in (mine, raw)]
        ratio = paired_ratio(mine, raw).value  # how many times faster the raw run is
        rows.append({"raw": name, "session_p50_us": medians[0], "raw_p50_us": medians[1], "ratio": ratio})
        print(f"{name:38} {medians[0]:9.2f} µs {medians[1]:6.2f} µs {ratio:6.3f}")
    worst = max(float(row["ratio"]) for row in rows)
    print(f"ratio {worst:.3f} (goal: at most {GOAL}): {'met' if worst <= GOAL else 'NOT met'}")
    if out is not None:
        document = {"conditions": conditions(threads=usable_cores(), device="cpu"), "goal": GOAL, "results": rows}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
