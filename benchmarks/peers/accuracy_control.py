"""NNCF's search for the layers to leave in floating point, in the peers' own environment (`make peers`).

    .venv-peers/bin/python benchmarks/peers/accuracy_control.py MODEL.onnx DATA.npz OUT.xml --drop POINTS

DATA.npz has `calib` (N, C, H, W), `images` and `labels` (N,). `quantize_with_accuracy_control` is used as its documents advise, with the
absolute drop of top-1. The seconds it took, and the versions in use, go to standard output as JSON.
"""

import argparse
import json
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import nncf
import numpy as np
import openvino

BATCH = 32


def accuracy(compiled: openvino.CompiledModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, None]:
    """The share of images that are classified right."""
    right = total = 0
    for images, labels in batches:
        right += int((compiled(images)[0].argmax(axis=1) == labels).sum())
        total += len(labels)
    return right / total, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drop", type=float, required=True)
    args = parser.parse_args()
    data = np.load(args.data)
    images, labels = data["images"], data["labels"]
    judged = [(images[at : at + BATCH], labels[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    start = time.perf_counter()
    quantized = nncf.quantize_with_accuracy_control(
        openvino.Core().read_model(str(args.model)),
        calibration_dataset=nncf.Dataset([row[None] for row in data["calib"]]),
        validation_dataset=nncf.Dataset(judged, lambda pair: pair[0]),
        validation_fn=accuracy,
        max_drop=args.drop / 100,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(data["calib"]),
    )
    seconds = time.perf_counter() - start
    openvino.save_model(quantized, str(args.out), compress_to_fp16=False)
    print(json.dumps({"seconds": seconds, **{name: metadata.version(name) for name in ("nncf", "openvino")}}))


if __name__ == "__main__":
    main()
