"""NNCF's search for the layers to leave in floating point, in the peers' own environment (`make peers`).

    .venv-peers/bin/python benchmarks/peers/accuracy_control.py MODEL.onnx DATA.npz OUT.xml --drop POINTS [--transformer]

DATA.npz has `calib` (N, C, H, W), `judged` (N, C, H, W) and `judged_labels` (N,). `quantize_with_accuracy_control` is used as its documents advise, with the
absolute drop of top-1. To standard output go, as JSON, the seconds it took, the points that its plain INT8 loses on the images (`plain`), how
many quantizers of that are left, and of how many (`quantizers`), and the versions in use.
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
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def accuracy(compiled: openvino.CompiledModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, None]:
    """The share of images that are classified right."""
    right = total = 0
    for images, labels in batches:
        right += int((compiled(images)[0].argmax(axis=1) == labels).sum())
        total += len(labels)
    return right / total, None


def quantizers(model: openvino.Model) -> int:
    return sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drop", type=float, required=True)
    parser.add_argument("--transformer", action="store_true")
    args = parser.parse_args()
    data = np.load(args.data)
    images, labels = data["judged"], data["judged_labels"]
    judged = [(images[at : at + BATCH], labels[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    core = openvino.Core()
    model = core.read_model(str(args.model))
    calib = nncf.Dataset([row[None] for row in data["calib"]])
    options = {
        "subset_size": len(data["calib"]),
        "model_type": nncf.ModelType.TRANSFORMER if args.transformer else None,
    }
    start = time.perf_counter()
    quantized = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=calib,
        validation_dataset=nncf.Dataset(judged, lambda pair: pair[0]),
        validation_fn=accuracy,
        max_drop=args.drop / 100,
        drop_type=nncf.DropType.ABSOLUTE,
        **options,
    )
    seconds = time.perf_counter() - start
    openvino.save_model(quantized, str(args.out), compress_to_fp16=False)
    plain = nncf.quantize(model, calib, **options)
    scores = [accuracy(core.compile_model(each, "CPU", EXACT), judged)[0] for each in (model, plain)]
    found = {"seconds": seconds, "plain": 100 * (scores[0] - scores[1]), "quantizers": [quantizers(quantized), quantizers(plain)]}
    print(json.dumps({**found, **{name: metadata.version(name) for name in ("nncf", "openvino")}}))


if __name__ == "__main__":
    main()
