"""INT8 calibration of ResNet-34 at 224, whole process from ImageFolder to written file: ours and the peers.

    python benchmarks/int8_calibration.py [--photos IMAGEFOLDER] [--rounds 3] [--peers PYTHON]

All take the same images, ours with entropy (bias correction and parity included) into an empty cache. The tools take
turns; after the timed rounds each runs once more to be weighed (peak of the PSS summed over its processes), ours three
times, and three times with 1,024 images: the medians count. Without --photos the images are made; the weights are random: neither changes the time. Goals: 3 times
faster than ModelOpt entropy, 5 times than ONNX Runtime Entropy; at most 1.6 times the time of decoding and the forward passes alone; auto in
at most 1.3 times the time of entropy; 0.95 GB, within 5 % with eight times the images.
"""

import itertools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_harness import (
    Goal,
    Run,
    add_peers,
    add_photos,
    bullets,
    check_peers,
    conditions_here,
    conditions_line,
    exit_status,
    in_turns,
    make_parser,
    make_photos,
    markdown,
    our_command,
    peer_command,
    publish,
    run,
)

import deploy
from deploy.artifact.artifact import Artifact
from deploy.calibration.imagefolder import scan

IMAGES, MANY = 128, 1024
WEIGHED = 3
"""How often ours is weighed: which two runs meet at their peaks is chance."""
OURS = "deploy"
TOOLS = ("onnxruntime-minmax", "onnxruntime-entropy", "modelopt-max", "modelopt-entropy", "nncf")
GOALS = {"modelopt-entropy": 3.0, "onnxruntime-entropy": 5.0}
AUTO, BARE = "deploy, auto", "decoding and forward passes alone"
ALONE = "deploy, --no-cpu-form"
"""One file, as the peers write."""
GOAL_AUTO, GOAL_BARE = 1.3, 1.6
GOAL_BYTES, GOAL_GROWTH = 0.95e9, 0.05
PASSES = """
import sys, time
from pathlib import Path
import onnxruntime
from deploy.artifact.artifact import Artifact
from deploy.calibration.imagefolder import batches, scan
artifact, folder, count = sys.argv[1:]
artifact = Artifact.open(artifact)
start = time.perf_counter()
session = onnxruntime.InferenceSession(str(artifact.onnx_path), providers=["CPUExecutionProvider"])
(name,) = (value.name for value in session.get_inputs())
for images, _ in batches(scan(Path(folder)).sample(int(count)), artifact.preprocess.open, 2):
    session.run(None, {name: images})
print(time.perf_counter() - start)
"""
"""In FP32, in the order of the calibration; prints the seconds of a process that has its libraries."""


def collect(photos: Path, folder: Path) -> None:
    """MANY links to the images of `photos`, class by class; if there are fewer, they are used again."""
    samples = scan(photos).samples
    for index, (path, label) in enumerate(itertools.islice(itertools.cycle(samples), MANY)):
        link = folder / f"{label:04}" / f"{index:05}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.absolute(), link)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The model and the images that every tool calibrates, and the folder that it works in."""

    artifact: Artifact
    images: Path
    peers: Path
    work: Path

    def run(self, tool: str, images: int = IMAGES, *, weigh: bool = False) -> Run:
        """Quantize once with `tool`; its output and its cache are removed."""
        out, cache = self.work / "out", self.work / "cache"
        out.mkdir()
        if tool in (OURS, AUTO, ALONE):
            settings = ["--method", "auto" if tool == AUTO else "entropy", *(["--no-cpu-form"] if tool == ALONE else [])]
            command = our_command(self.artifact.location, self.images, images, out / "int8", *settings)
        elif tool == BARE:
            command = [sys.executable, "-c", PASSES, str(self.artifact.path), str(self.images), str(images)]
        else:
            preprocess = self.artifact.manifest.preprocess
            assert preprocess is not None
            samples = scan(self.images).sample(images)
            command = peer_command(self.peers, tool, self.artifact.onnx_path, samples, preprocess.to_json(), out / "int8.onnx")
        done = run(command, cache, weigh=weigh)
        shutil.rmtree(out)
        shutil.rmtree(cache, ignore_errors=True)
        return done

    def timed(self, tool: str) -> Callable[[], float]:
        def once() -> float:
            done = self.run(tool)
            seconds = float(done.output.split()[-1]) if tool == BARE else done.seconds
            print(f"timed: {tool:22} {seconds:6.1f} s", flush=True)
            return seconds

        return once

    def peak(self, tool: str, images: int = IMAGES) -> int:
        peak = self.run(tool, images, weigh=True).peak
        assert peak is not None
        print(f"weighed: {tool:22} {peak / 1e9:6.2f} GB", flush=True)
        return peak


def measure(task: Task, tools: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of every round and peak bytes, by tool, and the two of ours with MANY images."""
    seconds = in_turns({tool: task.timed(tool) for tool in tools}, rounds)
    # Ratios by round, not of the medians: what slows a round slows all tools in it.
    ratios = {tool: statistics.median(b / a for a, b in zip(seconds[OURS], seconds[tool], strict=True)) for tool in tools}
    peaks = {tool: task.peak(tool) for tool in tools if tool != OURS}
    few, many = zip(*((task.peak(OURS), task.peak(OURS, MANY)) for _ in range(WEIGHED)), strict=True)
    return {
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": {OURS: int(statistics.median(few)), **peaks},
        "peak_bytes_many": int(statistics.median(many)),
        "seconds_many": task.run(OURS, MANY).seconds,
    }


def goals(document: Mapping[str, Any]) -> list[Goal]:
    ratios, peak = document["ratios"], document["peak_bytes"][OURS]
    growth = document["peak_bytes_many"] / peak - 1
    return [
        *(
            Goal(text=f"{ratios[tool]:.2f} times faster than {tool} (goal: at least {goal:g})", met=ratios[tool] >= goal)
            for tool, goal in GOALS.items()
            if tool in ratios
        ),
        Goal(text=f"auto in {ratios[AUTO]:.2f} times the time (goal: at most {GOAL_AUTO:g})", met=ratios[AUTO] <= GOAL_AUTO),
        Goal(
            text=f"{1 / ratios[BARE]:.2f} times the time of {BARE} (goal: at most {GOAL_BARE:g})",
            met=1 / ratios[BARE] <= GOAL_BARE,
        ),
        Goal(text=f"peak {peak / 1e9:.2f} GB (goal: at most {GOAL_BYTES / 1e9:g})", met=peak <= GOAL_BYTES),
        Goal(text=f"{growth:+.1%} memory with {MANY:,} images (goal: within {GOAL_GROWTH:.0%})", met=growth <= GOAL_GROWTH),
    ]


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [
            tool,
            f"{statistics.median(values):.1f} s",
            f"{document['ratios'][tool]:.2f}",
            f"{document['peak_bytes'][tool] / 1e9:.2f} GB",
        ]
        for tool, values in document["seconds"].items()
    ]
    many = [f"{document['seconds_many']:.1f} s", "-", f"{document['peak_bytes_many'] / 1e9:.2f} GB"]
    table = markdown(["tool", "median of the rounds", "times ours", "peak PSS"], [*rows, [f"{OURS}, {MANY:,} images", *many]])
    return (
        f"# INT8 calibration of ResNet-34 at 224: {document['images']} images, ImageFolder to written file\n\n"
        f"{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"
    )


def main() -> int:
    parser = make_parser(__doc__)
    add_photos(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=TOOLS, help="peers (default: all)")
    add_peers(parser)
    options = parser.parse_args()
    peers = check_peers(options.peers)
    document = {"conditions": conditions_here(), "images": IMAGES, "photos": options.photos is not None}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        images = work / "images"
        if options.photos is None:
            make_photos(images, MANY)
        else:
            collect(options.photos, images)
        task = Task(artifact=deploy.export(work / "resnet34", arch="resnet34"), images=images, peers=peers, work=work)
        document |= measure(task, (OURS, AUTO, ALONE, BARE, *options.tools), options.rounds)
    publish("int8-calibration", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
