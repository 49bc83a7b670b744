"""The peak memory and the seconds of the stages on a large vision transformer: how many times the size of its weights they take.

    python benchmarks/stage_memory.py [--arch torchvision:vit_l_16] [--images 32]

Each stage is a process of its own, with random weights and images that are made. It runs twice: timed, and weighed, which slows it
down. The peak is the proportional set size of its process tree, read every 50 ms. Goals, in multiples of the FP32 weights plus 1 GB: export 3.5, convert and build-trt --fp16 3, quantize 4.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_harness import (
    Goal,
    bullets,
    conditions_here,
    conditions_line,
    exit_status,
    make_parser,
    make_photos,
    markdown,
    our_command,
    publish,
    run,
)

from deploy.artifact.artifact import Artifact

GIGABYTE = 1e9
GOALS = {"export": 3.5, "convert --fp16": 3.0, "build-trt --fp16": 3.0, "quantize": 4.0}


def measure(arch: str, images: int, stages: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", images)
        deploy = [sys.executable, "-m", "deploy"]
        net = str(root / "net")
        commands = {
            "export": [*deploy, "export", "--arch", arch, "-o", net],
            "convert --fp16": [*deploy, "convert", net, "--fp16", "-o", f"{net}-fp16"],
            "build-trt --fp16": [*deploy, "build-trt", net, "--fp16", "--no-cache", "-o", f"{net}-trt"],
            "quantize": our_command(root / "net", root / "photos", images, root / "net-int8"),
        }
        rows = {}
        for name in stages:
            seconds = run(commands[name], root / "timed").seconds
            shutil.rmtree(commands[name][commands[name].index("-o") + 1])
            peak = run(commands[name], root / "weighed", weigh=True).peak
            assert peak is not None
            rows[name] = {"peak_bytes": peak, "seconds": seconds}
            print(f"{name}: {peak / GIGABYTE:.2f} GB, {seconds:.0f} s", flush=True)
        weights = Artifact.open(root / "net").size
    return {"conditions": conditions_here(), "arch": arch, "weights_bytes": weights, "images": images, "stages": rows}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    found = []
    for name, row in document["stages"].items():
        most = GOALS[name] * document["weights_bytes"] + GIGABYTE
        text = f"{name}: {row['peak_bytes'] / GIGABYTE:.2f} GB (goal: at most {most / GIGABYTE:.2f}, {GOALS[name]:g} times the weights and 1 GB)"
        found.append(Goal(text=text, met=row["peak_bytes"] <= most))
    return found


def report(document: Mapping[str, Any]) -> str:
    weights = document["weights_bytes"]
    rows = [
        [name, f"{row['peak_bytes'] / GIGABYTE:.2f} GB", f"{row['peak_bytes'] / weights:.1f}", f"{row['seconds']:.0f} s"]
        for name, row in document["stages"].items()
    ]
    table = markdown(["", "peak", "times the weights", "time"], rows)
    title = f"# Memory of the stages: {document['arch']}, {weights / GIGABYTE:.2f} GB in FP32\n"
    return f"{title}\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--arch", default="torchvision:vit_l_16", help="as of deploy export (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, help="calibration images (default: %(default)s)")
    parser.add_argument(
        "--stage", action="append", choices=[*GOALS][1:], help="measure this stage after the export (default: all)"
    )
    options = parser.parse_args()
    stages = ["export", *(options.stage or [*GOALS][1:])]
    document = measure(options.arch, options.images, stages)
    publish("stage-memory", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
