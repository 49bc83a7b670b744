"""What `Session.run` adds, lenet5, batch 1: to onnxruntime's own `InferenceSession.run`, and to an engine on CUDA tensors.

    python benchmarks/session_overhead.py

Goals: at most 1.25 times, and at most 15 µs. For the engine, a GPU and a TensorRT whose calls cost nothing stand below the
session (`null_gpu.py`), so that what is measured is the processor time of our own code.

All in one process. The session takes turns, run by run, with the very InferenceSession that is inside it; and, block by
block, with an InferenceSession as onnxruntime opens it by default, after pauses in which its threads stop spinning.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, in_turns, make_parser, markdown, publish
from null_gpu import null_session

import deploy
from deploy.artifact.artifact import Artifact
from deploy.evidence.timing import latency, paired_ratio, sample

GOAL = 1.25
ENGINE_GOAL_US = 15.0
ROUNDS = 40
RUNS = 250
PAUSE_S = 0.08

Run = Callable[[], object]
Pair = tuple[list[float], list[float]]


def run_by_run(ours: Run, raw: Run) -> Callable[[], Pair]:
    """One round: seconds of RUNS runs of each, one after the other; which of them is first changes from round to round."""
    order = [0, 1]

    def once() -> Pair:
        time.sleep(PAUSE_S)
        times: Pair = ([], [])
        for _ in range(RUNS):
            for side in order:
                times[side].extend(sample((ours, raw)[side], 0.0))
        order.reverse()
        return times

    return once


def block_by_block(ours: Run, raw: Run) -> Callable[[], Pair]:
    """One round: seconds of RUNS runs of the one, then of the other."""

    def block(run: Run) -> list[float]:
        time.sleep(PAUSE_S)
        sample(run, 1.0, RUNS // 10)
        return sample(run, 1.0, RUNS)

    return lambda: (block(ours), block(raw))


def engine_us(artifact: Artifact, folder: Path) -> dict[str, float]:
    """Microseconds of our own code in a run of an engine, medians of blocks of RUNS runs, without and with CUDA graphs."""
    engine = deploy.build_trt(artifact, folder / "engine", flavour="tensorrt-rtx")
    found = {}
    for variant in ((), ("cuda_graph",)):
        with null_session(engine, variant) as (session, feed):
            times = []
            for _ in range(ROUNDS):
                start = time.thread_time()
                for _ in range(RUNS):
                    session.run(feed)
                times.append((time.thread_time() - start) / RUNS * 1e6)
        found[",".join(variant) or "plain"] = latency(times[ROUNDS // 4 :]).p50
    return found


def measure() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each raw session: both medians in microseconds, and their ratio by rounds; and the microseconds of an engine."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = deploy.export(Path(folder) / "lenet5", arch="lenet5")
        session = deploy.load(artifact, "onnxruntime")
        engine = engine_us(artifact, Path(folder))
        plain = onnxruntime.InferenceSession(str(artifact.onnx_path), providers=["CPUExecutionProvider"])
    (spec,), (result,) = session.inputs, session.outputs
    feed = {spec.name: np.random.default_rng(0).standard_normal(spec.concrete({"batch": 1}), dtype=np.float32)}
    inner = session._session  # type: ignore[attr-defined]

    def ours() -> object:
        return session.run(feed)

    sides = {
        "the InferenceSession inside": run_by_run(ours, lambda: inner.run([result.name], feed)),
        "InferenceSession by default": block_by_block(ours, lambda: plain.run([result.name], feed)),
    }
    return [row(name, rounds) for name, rounds in in_turns(sides, ROUNDS, steady=True).items()], engine


def row(name: str, rounds: list[Pair]) -> dict[str, Any]:
    ours, raw = ([pair[side] for pair in rounds] for side in (0, 1))
    medians = [latency([value * 1e6 for part in side for value in part]).p50 for side in (ours, raw)]
    ratio = paired_ratio(ours, raw).value  # how many times as fast the raw run is
    return {"raw": name, "session_p50_us": medians[0], "raw_p50_us": medians[1], "ratio": ratio}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    worst = max(row["ratio"] for row in document["results"])
    most = max(document["engine_us"].values())
    return [
        Goal(text=f"`session.run` takes {worst:.3f} times as long (goal: at most {GOAL:g})", met=worst <= GOAL),
        Goal(
            text=f"on CUDA tensors, a run of an engine takes {most:.1f} µs of our own code (goal: at most {ENGINE_GOAL_US:g})",
            met=most <= ENGINE_GOAL_US,
        ),
    ]


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [row["raw"], f"{row['session_p50_us']:.2f} µs", f"{row['raw_p50_us']:.2f} µs", f"{row['ratio']:.3f}"]
        for row in document["results"]
    ]
    table = markdown(["lenet5, batch 1: `session.run` against", "session p50", "raw p50", "ratio"], rows)
    return f"# What a session adds\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    options = make_parser(__doc__).parse_args()
    results, engine = measure()
    document = {"conditions": conditions_here(), "results": results, "engine_us": engine}
    publish("session-overhead", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
