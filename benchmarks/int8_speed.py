"""ResNet-34 at 224 in INT8 on the CPU against eager PyTorch in FP32, batches 1 and 8. Goal: 4 times on OpenVINO.

    python benchmarks/int8_speed.py [--photos IMAGEFOLDER] [--seconds S]

Every candidate runs in its own process, in rounds that alternate with those of eager. The weights are random and the
calibration images made, unless there are photographs: neither changes the time. Nodes of the graph that are not INT8 run in
FP32, unless the backend is set otherwise; the table shows the precision of each artifact.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_harness import (
    Goal,
    add_photos,
    bench_table,
    bullets,
    conditions_line,
    exit_status,
    make_parser,
    make_photos,
    publish,
)

import deploy
from deploy.bench.bench import bench
from deploy.bench.options import BenchOptions

GOAL = 4.0
BATCHES = (1, 8)
BACKENDS = ("openvino", "onnxruntime")
IMAGES = 64


def measure(photos: Path | None, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if photos is None:
            photos = work / "images"
            make_photos(photos, IMAGES)
        artifact = deploy.export(work / "resnet34", arch="resnet34")
        quantized = deploy.quantize(artifact, work / "resnet34-int8", calib=photos, images=IMAGES)
        return bench([artifact, quantized], BenchOptions(backends=BACKENDS, batches=BATCHES, seconds=seconds)).to_json()


def goals(document: Mapping[str, Any]) -> list[Goal]:
    return [
        Goal(
            text=f"batch {row['batch']}: OpenVINO in INT8 {row['speedup']:.2f} times eager (goal: at least {GOAL:g})",
            met=row["speedup"] >= GOAL,
        )
        for row in document["results"]
        if row["precision"].startswith("int8") and row["backend"] == "openvino"
    ]


def report(document: Mapping[str, Any]) -> str:
    title = "# ResNet-34 at 224 in INT8, against eager PyTorch in FP32"
    return f"{title}\n\n{bench_table(document)}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    add_photos(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on measuring (default: %(default)s)")
    options = parser.parse_args()
    document = measure(options.photos, options.seconds)
    publish("int8-speed", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
