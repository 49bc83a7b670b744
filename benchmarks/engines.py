"""Engines of every reference architecture, built on this machine: seconds, size and precision share.

    python benchmarks/engines.py [--flavour tensorrt-rtx] [NAME]...

Exports each architecture with random weights into a temporary folder and builds it in FP32, FP16 and BF16 with the
default profile (batch 1 to 32). The seconds are those of the build alone: parsing and building, without the export and
the conversion. Fails when an engine cannot be built or does not honour its precision.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import deploy
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.models.registry import ARCHITECTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--flavour", default="auto", help="auto, tensorrt or tensorrt-rtx")
    args = parser.parse_args()
    logging.getLogger("deploy").setLevel(logging.ERROR)  # that the weights are random is no news here
    flavour = load_flavour(args.flavour)
    print(f"{flavour.name} {flavour.version}")
    print(f"{'architecture':<22} {'asked':<6} {'build s':>8} {'MB':>8}  share of multiply-accumulates")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or ARCHITECTURES:
            exported = deploy.export(Path(folder, name), arch=name)
            for precision in (None, "fp16", "bf16"):
                out = Path(folder, f"{name}-{precision}-trt")
                engine = deploy.build_trt(exported, out, precision=precision, flavour=args.flavour)
                start = time.perf_counter()
                build_engine(flavour, engine.onnx_path, engine.manifest.profiles, BuildOptions())
                seconds = time.perf_counter() - start
                share = engine.manifest.precision_share
                assert share is not None
                parts = [f"{getattr(share, kind):.1%} {kind}" for kind in ("fp16", "bf16", "fp32") if getattr(share, kind)]
                asked = precision or "fp32"
                print(f"{name:<22} {asked:<6} {seconds:8.2f} {engine.size / 1e6:8.1f}  {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
