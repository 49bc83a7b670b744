"""How long `deploy verify` takes, and how much memory.

    python benchmarks/verify_speed.py [--quick]

The command line, from its start to its end, on random input: a ResNet-50 in FP32 against FP16, and a ViT-Ti, both at 224 x 224, against INT8.
Each runs once for the time and once for the memory. Goals for both: 60 s and 1.5 GB.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, make_parser, markdown, publish, run

import deploy
from deploy.artifact.artifact import Artifact

NETS: dict[str, tuple[str, str]] = {
    "ResNet-50, FP16": ("resnet50", "fp16"),
    "ViT-Ti, INT8": ("timm:vit_tiny_patch16_224", "int8"),
}
QUICK = {"LeNet-5, INT8": ("lenet5", "int8")}
MOST_S, MOST_MB = 60, 1500
ROWS = 16
"""Rows of random input that INT8 is calibrated on."""


def other(fp32: Artifact, precision: str, folder: Path) -> Artifact:
    """The artifact in another precision."""
    if precision != "int8":
        return deploy.convert(fp32, folder / "other", precision="fp16")
    rng = np.random.default_rng(0)
    spec = fp32.manifest.inputs[0]
    (folder / "calib").mkdir()
    for row in range(ROWS):
        array = rng.standard_normal(spec.concrete({"batch": 1})[1:], dtype=np.float32)
        np.savez(folder / "calib" / f"{row}.npz", **{spec.name: array})  # type: ignore[arg-type]  # names of arrays
    return deploy.quantize(fp32, folder / "other", calib=folder / "calib", cpu_form=False)


def measure(arch: str, precision: str) -> dict[str, Any]:
    """Seconds of the command, and megabytes at most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp32 = deploy.export(folder / "fp32", arch=arch)
        made = other(fp32, precision, folder)
        command = [sys.executable, "-m", "deploy", "verify", str(fp32.path), str(made.path)]
        timed = run(command, folder / "cache", may_fail=True)
        weighed = run(command, folder / "cache", weigh=True, may_fail=True)
        if timed.status not in (0, 1):  # 1: an output parts
            sys.exit(timed.output)
        assert weighed.peak is not None
        return {
            "seconds": timed.seconds,
            "peak_mb": weighed.peak / 1e6,
            "status": timed.status,
            "output": timed.output.splitlines(),
        }


def goals(document: Mapping[str, Any]) -> list[Goal]:
    return [
        Goal(
            text=f"{name} in {row['seconds']:.0f} s and {row['peak_mb']:.0f} MB, at most {MOST_S} and {MOST_MB}",
            met=row["seconds"] <= MOST_S and row["peak_mb"] <= MOST_MB,
        )
        for name, row in document["runs"].items()
    ]


def report(document: Mapping[str, Any]) -> str:
    rows = [[name, f"{row['seconds']:.1f} s", f"{row['peak_mb']:.0f} MB"] for name, row in document["runs"].items()]
    table = markdown(["", "time", "memory"], rows)
    return "\n\n".join(("# What `deploy verify` takes", conditions_line(document["conditions"]), table, bullets(goals(document))))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a LeNet-5, and no file of results")
    args = parser.parse_args()
    document: dict[str, Any] = {"conditions": conditions_here()}
    document["runs"] = {name: measure(*net) for name, net in (QUICK if args.quick else NETS).items()}
    if args.quick:
        print(report(document))
    else:
        publish("verify-speed", document, report(document), args.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    raise SystemExit(main())
