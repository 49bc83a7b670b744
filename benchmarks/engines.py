"""Engines of every reference architecture, built on this machine: seconds, size and precision share. Goal: 5 s each.

    python benchmarks/engines.py [--flavour tensorrt-rtx] [NAME]...

Exports each architecture with random weights into a temporary folder and builds it in FP32, FP16, BF16, INT8, and INT8 with
the rest in FP16, with the default profile (batch 1 to 32); INT8 is calibrated on random input. `build` is the time of
parsing and building, without the export and the conversion; `again` is that of the same build once more, which is copied
from the cache (goal: 0.5 s). Fails when an engine cannot be built, does not honour its precision, or misses a goal.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, make_parser, markdown, publish, seconds_of

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.artifact.tensors import random_feed
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import Flavour, load_flavour
from deploy.models.registry import ARCHITECTURES

GOAL_S, CACHED_GOAL_S = 5.0, 0.5
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"int8": True},
    "int8+fp16": {"int8": True, "precision": "fp16"},
}


def measure(names: Sequence[str], flavour: Flavour, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each architecture and precision."""
    for name in names:
        exported = deploy.export(folder / name, arch=name)
        for asked in PRECISIONS:
            yield {"architecture": name, "asked": asked, **build(exported, asked, flavour)}


def build(exported: Artifact, asked: str, flavour: Flavour) -> dict[str, Any]:
    """Build one engine three times: as an artifact, without the cache, and from the cache."""
    options = {"flavour": flavour.name, **PRECISIONS[asked], "allow_slower": "int8" in PRECISIONS[asked]}
    if options.get("int8"):
        options["calib"] = [random_feed(exported.manifest.inputs, {"batch": 2}, seed=seed) for seed in range(4)]
    out = exported.path.with_name(f"{exported.path.name}-{asked}")
    engine = deploy.build_trt(exported, Path(f"{out}-trt"), **options)
    seconds = seconds_of(lambda: build_engine(flavour, engine.onnx_path, engine.manifest.profiles, BuildOptions()))
    again = seconds_of(lambda: deploy.build_trt(exported, Path(f"{out}-again"), **options))
    share = engine.manifest.precision_share
    assert share is not None
    shares = {kind: getattr(share, kind) for kind in COMPUTE_PRECISIONS}
    return {"build_s": seconds, "again_s": again, "bytes": engine.size, "share": shares}


def cells(row: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{share:.1%} {kind}" for kind, share in row["share"].items() if share)
    times = [f"{row['build_s']:.2f} s", f"{row['again_s']:.2f} s"]
    return [row["architecture"], row["asked"], *times, f"{row['bytes'] / 1e6:.1f} MB", shares]


def goals(document: Mapping[str, Any]) -> list[Goal]:
    slowest = max(row["build_s"] for row in document["rows"])
    cached = max(row["again_s"] for row in document["rows"])
    return [
        Goal(text=f"the slowest build took {slowest:.2f} s (goal: under {GOAL_S:g})", met=slowest < GOAL_S),
        Goal(
            text=f"the slowest copy from the cache took {cached:.2f} s (goal: under {CACHED_GOAL_S:g})",
            met=cached < CACHED_GOAL_S,
        ),
    ]


def report(document: Mapping[str, Any]) -> str:
    header = ["architecture", "asked", "build", "again", "size", "share of multiply-accumulates"]
    table = markdown(header, [cells(row) for row in document["rows"]])
    conditions = conditions_line(document["conditions"])
    return f"# Engines built by {document['flavour']}\n\n{table}\n{bullets(goals(document))}\n{conditions}"


def main() -> int:
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--flavour", default="auto", help="auto, tensorrt or tensorrt-rtx")
    options = parser.parse_args()
    logging.getLogger("deploy").setLevel(logging.ERROR)  # that the weights are random is no news here
    flavour = load_flavour(options.flavour)
    document: dict[str, Any] = {"conditions": conditions_here(), "flavour": f"{flavour.name} {flavour.version}", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        for row in measure(options.names or list(ARCHITECTURES), flavour, Path(folder)):
            print("  ".join(cells(row)), flush=True)
            document["rows"].append(row)
    publish("engines", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
