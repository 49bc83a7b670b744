"""What `deploy.export` costs over the bare ONNX exporter and the inference that parity needs, for `resnet34` at 224.

    python benchmarks/export_overhead.py [--rounds 3]

Bare: build the module, torch.onnx.export, save, and run eager and ONNX Runtime at the three batch sizes of parity.
Ours: `deploy.export` to an artifact, with the weights, hashes and manifest. They alternate in one process after one
round to warm up; the ratio is of the medians. Goal: at most 1.2.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

import deploy
from deploy.evidence.parity import PARITY_BATCHES
from deploy.models.registry import ARCHITECTURES

GOAL = 1.2


def bare(folder: Path) -> None:
    module = ARCHITECTURES["resnet34"].create().eval()
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        module,
        (torch.randn(2, 3, 224, 224),),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in PARITY_BATCHES:
        x = torch.randn(size, 3, 224, 224)
        with torch.inference_mode():
            module(x)
        session.run(None, {"input": x.numpy()})


def ours(folder: Path) -> None:
    deploy.export(folder / "artifact", arch="resnet34")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the first (default 3)")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(rounds + 1):
        for name, work in (("bare", bare), ("ours", ours)):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                work(Path(folder))
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}   median {medians[name]:6.2f} s   rounds " + " ".join(f"{value:.2f}" for value in values[1:]))
    ratio = medians["ours"] / medians["bare"]
    print(f"ratio  {ratio:6.2f}   (goal: at most {GOAL})")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
