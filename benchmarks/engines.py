"""Engines of every reference architecture, built on this machine: seconds, size and precision share. Goal: 5 s each.

    python benchmarks/engines.py [--flavour tensorrt-rtx] [NAME]...

Exports each architecture with random weights into a temporary folder and builds it in FP32, FP16, BF16, INT8, and INT8 with
the rest in FP16, with the default profile (batch 1 to 32); INT8 is calibrated on random input. The seconds are those of
parsing and building, without the export and the conversion; then those of the same build again, which is a copy out of the
cache (goal: 0.5 s). Fails when an engine cannot be built, does not honour its precision, or misses a goal.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import verdict

import deploy
from deploy.artifact.tensors import random_feed
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.models.registry import ARCHITECTURES

GOAL_S, CACHED_GOAL_S = 5.0, 0.5
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"int8": True},
    "int8+fp16": {"int8": True, "precision": "fp16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--flavour", default="auto", help="auto, tensorrt or tensorrt-rtx")
    args = parser.parse_args()
    logging.getLogger("deploy").setLevel(logging.ERROR)  # that the weights are random is no news here
    flavour = load_flavour(args.flavour)
    print(f"{flavour.name} {flavour.version}")
    print(f"{'architecture':<22} {'asked':<10} {'build s':>8} {'again s':>8} {'MB':>8}  share of multiply-accumulates")
    slowest = cached = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        for name in args.names or ARCHITECTURES:
            exported = deploy.export(Path(folder, name), arch=name)
            for asked, options in PRECISIONS.items():
                made = {"flavour": args.flavour, **options, "allow_slower": "int8" in options}
                if "int8" in options:
                    made["calib"] = [random_feed(exported.manifest.inputs, {"batch": 2}, seed=seed) for seed in range(4)]
                engine = deploy.build_trt(exported, Path(folder, f"{name}-{asked}-trt"), **made)
                start = time.perf_counter()
                build_engine(flavour, engine.onnx_path, engine.manifest.profiles, BuildOptions())
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                deploy.build_trt(exported, Path(folder, f"{name}-{asked}-again"), **made)
                again = time.perf_counter() - start
                slowest, cached = max(slowest, seconds), max(cached, again)
                share = engine.manifest.precision_share
                assert share is not None
                parts = [
                    f"{getattr(share, kind):.1%} {kind}" for kind in ("int8", "fp16", "bf16", "fp32") if getattr(share, kind)
                ]
                print(
                    f"{name:<22} {asked:<10} {seconds:8.2f} {again:8.2f} {engine.size / 1e6:8.1f}  {', '.join(parts)}", flush=True
                )
    print(verdict(f"the slowest build took {slowest:.2f} s (goal: under {GOAL_S:g})", slowest < GOAL_S))
    print(
        verdict(f"the slowest build out of the cache took {cached:.2f} s (goal: under {CACHED_GOAL_S:g})", cached < CACHED_GOAL_S)
    )
    if slowest >= GOAL_S or cached >= CACHED_GOAL_S:
        sys.exit(1)


if __name__ == "__main__":
    main()
