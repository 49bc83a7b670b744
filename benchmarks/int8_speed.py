"""INT8 on the CPU: ResNet-34 and EfficientNet-B0 at 224, batches 1 and 8, on ONNX Runtime against FP32 and its own quantizer.

    python benchmarks/int8_speed.py [--photos IMAGEFOLDER] [--seconds S]

Goals: on ONNX Runtime, INT8 is 3 times as fast as FP32 for ResNet-34, and for EfficientNet-B0 at least as fast as what ONNX Runtime's
quantizer makes (`quantize_static`, unsigned activations and a scale a channel, its faster settings); on OpenVINO, 4 times as fast as
eager PyTorch for ResNet-34.

Every candidate runs in its own process, in rounds that alternate with those of the baseline. The weights are random and the
calibration images made, unless there are photographs: neither changes the time. Without VNNI there is no CPU form, and ONNX Runtime's
goals are missed.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, add_photos, bullets, conditions_line, exit_status, make_parser, make_photos, markdown, publish
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.bench.bench import bench
from deploy.bench.options import BenchOptions

NETS = {"resnet34": "resnet34", "efficientnet_b0": "torchvision:efficientnet_b0"}
OVER_FP32, OVER_OWN, OVER_EAGER = 3.0, 1.0, 4.0
BATCHES = (1, 8)
IMAGES = 64
OWN_IMAGES = 8
"""Its time does not depend on the ranges."""


class Images(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """The first images of a folder, as the artifact wants them."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        assert artifact.preprocess is not None
        self._name = artifact.manifest.inputs[0].name
        self._arrays: Iterator[np.ndarray] = map(artifact.preprocess.open, sorted(folder.rglob("*.jpg"))[:OWN_IMAGES])

    def get_next(self) -> dict[str, np.ndarray] | None:
        array = next(self._arrays, None)
        return None if array is None else {self._name: array[None]}


def own_quantizer(artifact: Artifact, photos: Path, out: Path) -> Artifact:
    """What ONNX Runtime's quantizer makes of an FP32 artifact."""
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(artifact.onnx_path, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, out, Images(artifact, photos), per_channel=True, activation_type=QuantType.QUInt8)
    return open_artifact(out)


def measure(photos: Path | None, seconds: float) -> dict[str, Any]:
    documents = {}
    share = seconds / (len(NETS) + 1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if photos is None:
            photos = work / "images"
            make_photos(photos, IMAGES)
        for name, arch in NETS.items():
            artifact = deploy.export(work / name, arch=arch)
            quantized = deploy.quantize(artifact, work / f"{name}-int8", calib=photos, images=IMAGES)
            own = own_quantizer(artifact, photos, work / f"{name}-own.onnx")
            options = BenchOptions(
                backends=("onnxruntime",),
                baseline="onnxruntime",
                batches=BATCHES,
                seconds=share,
                different_models=True,  # the quantizer's file does not say what it was made from
            )
            documents[name] = bench([artifact, quantized, own], options).to_json()
        eager = BenchOptions(backends=("openvino",), batches=BATCHES, seconds=share)
        documents["resnet34 on OpenVINO"] = bench([open_artifact(work / "resnet34-int8")], eager).to_json()
    for document in documents.values():
        for row in document["results"]:
            row["artifact"] = Path(row["artifact"]).name  # the folder is gone
    return {"runs": documents, "conditions": documents["resnet34"]["conditions"]}


def speed(document: Mapping[str, Any], batch: int, ending: str) -> float:
    """How many times as fast as the baseline the artifact is whose name has this ending."""
    return float(
        next(row["speedup"] for row in document["results"] if row["batch"] == batch and row["artifact"].endswith(ending))
    )


def goals(document: Mapping[str, Any]) -> list[Goal]:
    found = []
    for batch in BATCHES:
        over = speed(document["runs"]["resnet34"], batch, "-int8")
        efficientnet = document["runs"]["efficientnet_b0"]
        own = speed(efficientnet, batch, "-int8") / speed(efficientnet, batch, "-own.onnx")
        eager = speed(document["runs"]["resnet34 on OpenVINO"], batch, "-int8")
        for what, value, goal in (
            ("ResNet-34, ONNX Runtime in INT8 {:.2f} times FP32", over, OVER_FP32),
            ("EfficientNet-B0, ONNX Runtime in INT8 {:.2f} times its own quantizer's", own, OVER_OWN),
            ("ResNet-34, OpenVINO in INT8 {:.2f} times eager", eager, OVER_EAGER),
        ):
            found.append(Goal(text=f"batch {batch}: {what.format(value)} (goal: at least {goal:g})", met=value >= goal))
    return found


def report(document: Mapping[str, Any]) -> str:
    parts = ["# INT8 on the CPU\n\n"]
    for name, each in document["runs"].items():
        rows = [
            [
                f"{row['artifact']} on {row['backend']}",
                str(row["batch"]),
                f"{row['p50_ms']:.1f} ms",
                f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})",
            ]
            for row in each["results"]
        ]
        parts.append(markdown([name, "batch", "p50", f"times {each['baseline']} in FP32"], rows) + "\n")
    return f"{''.join(parts)}{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    add_photos(parser)
    parser.add_argument("--seconds", type=float, default=120.0, help="time to spend on measuring (default: %(default)s)")
    options = parser.parse_args()
    document = measure(options.photos, options.seconds)
    publish("int8-speed", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
