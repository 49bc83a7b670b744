"""Whether `deploy predict --out` decodes images while it computes others: images a second over those of the slower of the two alone.

    python benchmarks/predict_overlap.py

One thread decodes JPEG photographs and one computes `resnet34`, so that on two cores neither takes time from the other. In turns: decoding alone,
computing alone, and both together, as the command does. Goal: at least 0.9 of the slower of the two, the median of the rounds. The first batch
is decoded and the last computed alone, which is a fortieth of the images and less of more. `--quick` tries the script.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, in_turns, make_parser, publish
from PIL import Image

import deploy
from deploy.data.images import image_input
from deploy.evaluation.batch import Item, Predictor
from deploy.evaluation.many import predict_many
from deploy.evaluation.many_options import BatchOptions

BATCH = 8


def photographs(folder: Path, count: int, side: int) -> list[Path]:
    folder.mkdir()
    paths = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return paths


def measure(folder: Path, rounds: int, count: int, side: int) -> dict[str, Any]:
    artifact = deploy.export(folder / "resnet34", arch="resnet34")
    paths = photographs(folder / "images", count, side)
    source = image_input(artifact)
    options = BatchOptions(batch_size=BATCH, workers=1, threads=1)
    feed = {"input": np.stack([source.load(path) for path in paths[:BATCH]])}
    turn = 0

    def rate(work: Callable[[], Any]) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            work()
            return count / (time.perf_counter() - start)

        return timed

    def together() -> None:
        nonlocal turn
        turn += 1
        predict_many(
            artifact, [str(folder / "images")], folder / f"{turn}.jsonl", options, rows=lambda _, __, items: open_one.rows(items)
        )

    with Predictor(artifact, options) as open_one, deploy.load(artifact, threads=1) as session:
        list(open_one.rows(iter([Item(path=path) for path in paths[:BATCH]])))
        sides = {
            "decode": rate(lambda: [source.load(path) for path in paths]),
            "compute": rate(lambda: [session.run(feed) for _ in range(count // BATCH)]),
            "together": rate(together),
        }
        per_s = in_turns(sides, rounds, warm_up=1, steady=True)
    ratios = [
        both / min(one, other) for both, one, other in zip(per_s["together"], per_s["decode"], per_s["compute"], strict=True)
    ]
    return {"images": count, "side": side, "images_per_s": per_s, "ratio": statistics.median(ratios)}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    found = document["overlap"]
    rates = {name: statistics.median(values) for name, values in found["images_per_s"].items()}
    return [
        Goal(
            text=f"{found['images']} JPEGs of {found['side']} x {found['side']}, resnet34, a thread each: {found['ratio']:.2f} of the slower of decoding"
            f" ({rates['decode']:.0f} images/s) and computing ({rates['compute']:.0f}), {rates['together']:.0f} together (goal: at least 0.9)",
            met=found["ratio"] >= 0.9,
        )
    ]


def report(document: Mapping[str, Any]) -> str:
    return f"# `deploy predict --out`\n\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first (default: %(default)s)")
    parser.add_argument("--images", type=int, default=320, help="of each side in each round (default: %(default)s)")
    parser.add_argument("--side", type=int, default=1600, help="pixels of an image (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of few small images, to try the script")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.images, options.side = 1, 24, 400
    document = {"conditions": {**conditions_here(), "rounds": options.rounds}}
    with tempfile.TemporaryDirectory() as name:
        document["overlap"] = measure(Path(name), options.rounds, options.images, options.side)
    publish("predict-overlap", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
