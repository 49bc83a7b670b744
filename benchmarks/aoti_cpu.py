"""Packages of AOTInductor on the CPU: resnet34 against eager at batches 1 and 8, and what a session adds to lenet5.

    python benchmarks/aoti_cpu.py [--quick]

Goals: resnet34 is built within 120 s, agrees to 1e-4 and is at least 1.1 times as fast as eager; a session adds at most 20 µs to
lenet5's bare package, and opening one takes at most 2 s beyond torch's import.

In one process with one thread, in turns: threads that wait for one another measure the machine. --quick measures lenet5 alone, in
few rounds: it tests this script. The weights are random: they do not change the time.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_harness import (
    Goal,
    bullets,
    conditions_here,
    conditions_line,
    exit_status,
    in_turns,
    make_parser,
    markdown,
    publish,
    seconds_of,
)

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import random_feed
from deploy.evidence.timing import latency, paired_ratio, sample

BATCHES = (1, 8)
ROUNDS = 40
SLICE_S = 0.3
OWN_RUNS = 500
OPENED = 5
"""How many processes open a package."""

BUILD_S = 120.0
SPEED = 1.1
PARITY = 1e-4
OWN_US = 20.0
OPEN_S = 2.0

OPEN = """
import sys, time
import deploy.runtime.session
import torch
start = time.perf_counter()
import deploy
deploy.load(sys.argv[1]).close()
print(time.perf_counter() - start)
"""


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """The figures of both models; with `quick`, lenet5 stands in for resnet34."""
    rounds = 2 if quick else ROUNDS
    small, small_package, _ = built(folder, "lenet5")
    large, package, build_s = (small, small_package, None) if quick else built(folder, "resnet34")
    return {
        "model": large.manifest.name,
        "build_s": build_s,
        "parity": max(each.max_rel for case in parity(package) for each in case.outputs.values()),
        "speed": [against_eager(large, package, batch, rounds) for batch in BATCHES],
        "own_us": own_us(small_package, rounds),
        "open_s": sorted(open_s(package) for _ in range(1 if quick else OPENED)),
    }


def built(folder: Path, arch: str) -> tuple[Artifact, Artifact, float]:
    """The export of `arch`, its package for the CPU, and the seconds that `build-aoti` took, in a process of its own."""
    source = deploy.export(folder / arch, arch=arch)
    out = folder / f"{arch}-aoti"
    command = [sys.executable, "-m", "deploy", "build-aoti", str(folder / arch), "--device", "cpu", "-o", str(out)]
    seconds = seconds_of(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    return source, deploy.open_artifact(out), seconds


def parity(package: Artifact) -> Any:
    assert package.manifest.parity is not None
    return package.manifest.parity.cases


def against_eager(source: Artifact, package: Artifact, batch: int, rounds: int) -> dict[str, Any]:
    """Both p50s in milliseconds, and how many times as fast the package is, by rounds."""
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(deploy.load(artifact, name, "cpu", threads=1))
            for name, artifact in (("eager", source), ("aoti", package))
        }
        feed = {name: torch.from_numpy(x) for name, x in random_feed(source.manifest.inputs, {"batch": batch}).items()}
        sides = {name: (lambda s=session: sample(lambda: s.run(feed), SLICE_S)) for name, session in sessions.items()}
        taken = in_turns(sides, rounds, warm_up=1)
    ratio = paired_ratio(taken["eager"], taken["aoti"])
    p50 = {name: latency([value * 1e3 for part in each for value in part]).p50 for name, each in taken.items()}
    return {"batch": batch, "p50_ms": p50, "speedup": ratio.value, "low": ratio.low, "high": ratio.high}


def own_us(package: Artifact, rounds: int) -> float:
    """Microseconds that `session.run` adds to the runner inside it, on one row: the difference of the medians."""
    with deploy.load(package, "aoti", "cpu", threads=1) as session:
        feed = {name: torch.from_numpy(x) for name, x in random_feed(session.inputs, {"batch": 1}).items()}
        inputs, runner = list(feed.values()), session._loader  # type: ignore[attr-defined]

        def pair() -> tuple[list[float], list[float]]:
            return sample(lambda: session.run(feed), 1.0, OWN_RUNS), sample(lambda: runner.boxed_run(list(inputs)), 1.0, OWN_RUNS)

        blocks = in_turns({"pair": pair}, rounds, warm_up=1)["pair"]
    ours, bare = ([value * 1e6 for pair in blocks for value in pair[side]] for side in (0, 1))
    return latency(ours).p50 - latency(bare).p50


def open_s(package: Artifact) -> float:
    """Seconds that a new process takes to open a package, beyond torch's import."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(package.path)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def goals(document: Mapping[str, Any]) -> list[Goal]:
    model, build_s, opened = document["model"], document["build_s"], document["open_s"][len(document["open_s"]) // 2]
    found = [Goal(text=f"{model} was built in {build_s:.0f} s (at most {BUILD_S:g})", met=build_s <= BUILD_S)] if build_s else []
    found += [
        Goal(
            text=f"{model}, batch {row['batch']}: {row['speedup']:.2f} times eager (at least {SPEED})",
            met=row["speedup"] >= SPEED,
        )
        for row in document["speed"]
    ]
    off, own = document["parity"], document["own_us"]
    return [
        *found,
        Goal(text=f"{model} is off by {off:.1e} of its largest output (at most {PARITY:g})", met=off <= PARITY),
        Goal(text=f"a session adds {own:.1f} µs to lenet5, batch 1 (at most {OWN_US:g})", met=own <= OWN_US),
        Goal(text=f"{model} opens in {opened:.2f} s beyond torch's import (at most {OPEN_S:g})", met=opened <= OPEN_S),
    ]


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [
            f"batch {row['batch']}",
            *(f"{row['p50_ms'][side]:.2f} ms" for side in ("eager", "aoti")),
            f"{row['speedup']:.2f}, {row['low']:.2f} to {row['high']:.2f}",
        ]
        for row in document["speed"]
    ]
    table = markdown([document["model"], "eager p50", "package p50", "times as fast"], rows)
    title = "# Packages of AOTInductor on the CPU, one thread"
    return f"{title}\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="lenet5 alone, in few rounds; writes no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    conditions = conditions_here() | {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        document = {"conditions": conditions, **measure(Path(folder), quick=options.quick)}
    if options.quick:
        print(report(document))
    else:
        publish("aoti-cpu", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
