"""Two segmenters and a detector, trained on scenes of digits: their accuracy, what INT8 loses, and the metrics against other libraries'.

    python benchmarks/scenes.py [--quick] [--work build/scenes-benchmark]

Makes the scenes of examples/scenes.py, trains `deeplab`, `rangeseg` and `detector` by examples/train_scenes.py with one thread,
exports and quantizes them, and measures both on every backend of the CPU that is installed.

Goals: mIoU and mAP of 60 % in FP32; INT8 loses at most 1 point on every backend; mIoU is torchmetrics' to 1e-6, and mAP
pycocotools' own from the file of boxes, of INT8 too, as numbers from 0 to 1.

What is in the folder of work already is not trained again. --quick trains for a few steps on few scenes: it tests this script.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import (
    HERE,
    Goal,
    bullets,
    conditions_here,
    conditions_line,
    exit_status,
    make_parser,
    markdown,
    publish,
)

import deploy
from deploy.artifact.artifact import Artifact
from deploy.data.images import image_inputs

EXAMPLES = HERE.parent / "examples"
LEAST = 60.0
"""Per cent of the metric, in FP32."""
MOST_LOST = 1.0
"""Points, in INT8."""
SAME = 1e-6
BATCH = 32
"""Of `deploy eval`: other batches may be computed in another order."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a model is exported, and the data that it is calibrated and judged on, from the folder of scenes on."""

    metric: str
    export: Mapping[str, Any]
    calib: str
    data: str


IMAGE = {"inputs": ["input=1x3x128x128"], "preprocess": str(EXAMPLES / "scenes.json")}
CASES = {
    "deeplab": Case(
        metric="miou",
        export={"arch": "torchvision:deeplabv3_mobilenet_v3_large", "num_classes": 4, **IMAGE},
        calib="train",
        data="val",
    ),
    "rangeseg": Case(
        metric="miou",
        export={
            "arch": "rangeseg",
            "num_classes": 4,
            "inputs": ["distance=1x1x128x128", "intensity=1x1x128x128"],
            "preprocess": f"distance={EXAMPLES / 'distance.json'},intensity={EXAMPLES / 'intensity.json'}",
        },
        calib="train/lidar",
        data="val/lidar",
    ),
    "detector": Case(
        metric="map",
        export={"model": f"{EXAMPLES / 'detector.py'}:Detector", "outputs": ["boxes", "scores"], "decode": "ssd", **IMAGE},
        calib="train",
        data="val/boxes.json",
    ),
}


def trained(name: str, work: Path, *, quick: bool) -> tuple[Path, dict[str, Any]]:
    """The state_dict of a model, and how it was trained: steps, loss at the end, seconds of CPU time."""
    weights, record = work / f"{name}.pth", work / f"{name}.json"
    if not record.exists():
        steps = ["--steps", "4"] if quick else []
        command = [sys.executable, "train_scenes.py", name, "--scenes", str(work / "scenes"), "-o", str(weights), *steps]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, cwd=EXAMPLES, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        record.write_text(json.dumps({"cpu_s": after.ru_utime - before.ru_utime, "last": said[-1] if said else ""}))
    return weights, json.loads(record.read_text())


def measure(name: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """The figures of one model."""
    case, scenes = CASES[name], work / "scenes"
    weights, training = trained(name, work, quick=quick)
    names = scenes / ("digits.txt" if name == "detector" else "classes.txt")
    fp32 = deploy.export(work / "build" / name, weights=weights, classes=names, **case.export)
    gate = {"eval_folder": scenes / case.data, "metric": case.metric, "max_drop": 100.0 if quick else MOST_LOST}
    int8 = deploy.quantize(fp32, work / "build" / f"{name}-int8", calib=scenes / case.calib, **gate)
    rows = []
    for gated in int8.manifest.accuracies or ():
        before = deploy.evaluate(fp32, scenes / case.data, metric=case.metric, backend=gated.backend)
        score = gated.judged
        rows.append(
            {
                "backend": gated.backend, "file": gated.file, "fp32": before.value, "fp32_low": before.low, "fp32_high": before.high,
                "int8": score.value, "loss": score.loss, "low": score.loss_low, "high": score.loss_high, "undecided": gated.undecided,
            }
        )  # fmt: skip
    classes = deploy.evaluate(fp32, scenes / case.data, metric=case.metric).classes
    theirs = {
        precision: 0.01
        * abs(
            OTHERS[case.metric](artifact, scenes / case.data)
            - deploy.evaluate(artifact, scenes / case.data, metric=case.metric, backend="onnxruntime").value
        )
        for precision, artifact in (("fp32", fp32), ("int8", int8))
    }
    return {
        "metric": case.metric,
        "training": training,
        "images": int8.manifest.accuracies[0].images,
        "classes": {each.name: each.value for each in classes},
        "rows": rows,
        "off": theirs,
    }


def torchmetrics_miou(artifact: Artifact, data: Path) -> float:
    """The mIoU of torchmetrics in per cent, from images and masks that are read here."""
    import torch
    from PIL import Image
    from torchmetrics.classification import MulticlassJaccardIndex

    theirs = MulticlassJaccardIndex(num_classes=4, ignore_index=255)
    made = {
        each.spec.name: (each.preprocess, folder)
        for each, folder in zip(image_inputs(artifact), ("images", "intensity"), strict=False)
    }
    files = sorted(path.name for path in (data / "images").glob("*.png"))
    with deploy.load(artifact, "onnxruntime") as session:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            feed = {name: np.stack([how.open(data / folder / file) for file in part]) for name, (how, folder) in made.items()}
            masks = np.stack([np.asarray(Image.open(data / "masks" / file)) for file in part])
            logits = session.run(feed)[session.outputs[0].name]
            theirs.update(torch.from_numpy(logits), torch.from_numpy(masks).long())
    return 100 * float(theirs.compute())


def pycocotools_map(artifact: Artifact, data: Path) -> float:
    """The mAP of pycocotools in per cent, from the file of boxes and the predictions as COCO writes results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()):  # it prints what it does
        truth = COCO(str(data))
        names = {each["name"]: each["id"] for each in truth.dataset["categories"]}
        ids = {each["file_name"]: each["id"] for each in truth.dataset["images"]}
        found = [
            {"image_id": ids[each.path.name], "category_id": names[name], "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for each in deploy.predict(artifact, data.parent / "images", min_score=0, backend="onnxruntime")
            for name, score, (x1, y1, x2, y2) in each.boxes
        ]
        done = COCOeval(truth, truth.loadRes(found), "bbox")
        done.evaluate()
        done.accumulate()
        done.summarize()
    return 100 * float(done.stats[0])


OTHERS = {"miou": torchmetrics_miou, "map": pycocotools_map}
SHOWN = {"miou": "mIoU", "map": "mAP"}
LIBRARY = {"miou": "torchmetrics", "map": "pycocotools"}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    found = []
    for name, case in document["models"].items():
        metric = SHOWN[case["metric"]]
        least = min(row["fp32"] for row in case["rows"])
        worst = max(case["rows"], key=lambda row: row["loss"])
        off = max(case["off"].values())
        found += [
            Goal(text=f"{name} has a {metric} of {least:.2f} % in FP32 (at least {LEAST:g})", met=least >= LEAST),
            Goal(
                text=f"{name} loses {worst['loss']:.2f} points in INT8 on {worst['backend']} (at most {MOST_LOST:g})",
                met=worst["loss"] <= MOST_LOST,
            ),
            Goal(text=f"{name}: {metric} is {LIBRARY[case['metric']]}' to {off:.1e} (at most {SAME:g})", met=off <= SAME),
        ]
    return found


def _trained(training: Mapping[str, Any]) -> str:
    taken = f"; trained in {training['cpu_s'] / 60:.1f} minutes of CPU time" if training["cpu_s"] is not None else ""
    return f"{taken} ({training['last']})"


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{name}, {SHOWN[case['metric']]}",
            row["backend"] + (f", {row['file']}" if row["file"] else ""),
            f"{row['fp32']:.2f} ({row['fp32_low']:.2f} to {row['fp32_high']:.2f})",
            f"{row['int8']:.2f}",
            f"{row['loss']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            "-" if row["undecided"] is None else "no number" if row["undecided"] < 0 else f"{row['undecided']:,}",
        ]
        for name, case in document["models"].items()
        for row in case["rows"]
    ]
    table = markdown(["per cent", "backend", "FP32", "INT8", "points lost", "images that would decide"], rows)
    by_class = [
        f"{name}: {', '.join(f'{each} {value:.1f} %' for each, value in case['classes'].items() if value is not None)};"
        f" {case['images']} images{_trained(case['training'])}"
        for name, case in document["models"].items()
    ]
    return (
        f"# Segmenters and a detector on scenes of digits\n\n{table}\nIntervals are of 95 %.\n\n{bullets(by_class)}\n"
        f"{bullets(goals(document))}\n{conditions_line(document['conditions'])}"
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/scenes-benchmark"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--models", default=",".join(CASES), help="only some of %(default)s; writes no results")
    parser.add_argument("--quick", action="store_true", help="a few steps on few scenes; writes no results")
    options = parser.parse_args()
    work = (options.work / "quick" if options.quick else options.work).resolve()
    images = ["--images", "24,12"] if options.quick else []
    subprocess.run([sys.executable, "scenes.py", "--output", str(work / "scenes"), *images], cwd=EXAMPLES, check=True)
    conditions = conditions_here()
    chosen = options.models.split(",")
    document = {"conditions": conditions, "models": {name: measure(name, work, quick=options.quick) for name in chosen}}
    if options.quick or chosen != list(CASES):
        print(report(document))
    else:
        publish("scenes", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
