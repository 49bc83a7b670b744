"""ResNet-34 at 224 in INT8 on the CPU against eager PyTorch in FP32, batches 1 and 8. Goal: 4 times on OpenVINO.

    python benchmarks/int8_speed.py [--photos IMAGEFOLDER] [--seconds S]

Every candidate runs in a process of its own, in rounds that alternate with eager's. The weights are random and the
calibration images made, unless there are photographs: neither changes the time. What is not INT8 in the graph runs in
FP32, unless the backend is told otherwise; the table says what it ran in.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from common import make_photos, markdown, verdict, write_results

import deploy
from deploy.bench.bench import bench
from deploy.bench.plan import BenchOptions
from deploy.bench.report.table import print_table

GOAL = 4.0
BATCHES = (1, 8)
BACKENDS = ("openvino", "onnxruntime")
IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="ImageFolder of photographs (default: images are made)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on measuring (default %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        photos = options.photos
        if photos is None:
            photos = work / "images"
            make_photos(photos, IMAGES)
        artifact = deploy.export(work / "resnet34", arch="resnet34")
        quantized = deploy.quantize(artifact, work / "resnet34-int8", calib=photos, images=IMAGES)
        result = bench([artifact, quantized], BenchOptions(backends=BACKENDS, batches=BATCHES, seconds=options.seconds))
    print_table(result, sys.stdout)
    rows, lines = [], []
    for row in result.results:
        speed = f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
        rows.append([f"{row.backend}, {row.precision}", str(row.batch), f"{row.p50_ms:.1f} ms", f"{row.p99_ms:.1f} ms", speed])
        if row.precision.startswith("int8") and row.backend == "openvino":
            met = row.speedup >= GOAL
            lines.append(
                verdict(f"batch {row.batch}: OpenVINO in INT8 {row.speedup:.2f} times eager (goal: at least {GOAL:g})", met)
            )
    found = result.conditions
    versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    text = (
        "# ResNet-34 at 224 in INT8, against eager PyTorch in FP32\n\n"
        + markdown(["", "batch", "p50", "p99", "times eager"], rows)
        + "\n"
        + "".join(f"- {line}\n" for line in lines)
        + f"\n{found['cpu']}, {found['threads']} threads, load average {found['load_average'][0]} before; {versions}; {found['time']}.\n"
    )
    print("".join(f"{line}\n" for line in lines))
    write_results("int8-speed", result.to_json(), text)


if __name__ == "__main__":
    main()
