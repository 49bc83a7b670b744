"""Trains a segmenter or a detector on the scenes of examples/scenes.py, and saves its state_dict.

    python examples/train_scenes.py deeplab|rangeseg|detector [--scenes build/scenes] [--steps N] [-o build/MODEL.pth]

deeplab: torchvision's deeplabv3_mobilenet_v3_large, from random weights. rangeseg: this project's, on the range images. detector:
examples/detector.py. A few minutes each on one core.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detector import Detector
from PIL import Image
from scenes import EDGE, NAMES, SIDE
from torch import Tensor, nn
from torch.nn import functional

import deploy.models

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
"""Those of the preprocessing `imagenet`."""
CLASSES = 1 + len(NAMES)


def pictures(folder: Path) -> Tensor:
    """All images of a split, as `deploy export --preprocess scenes.json` has them."""
    files = sorted((folder / "images").iterdir())
    return torch.stack([(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 - MEAN) / STD for file in files])


def masks(folder: Path) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).long() for file in sorted((folder / "masks").iterdir())])


def boxes(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Corners and labels of each picture."""
    document = json.loads((folder / "boxes.json").read_text())
    found: dict[int, list[list[float]]] = {image["id"]: [] for image in document["images"]}
    for each in document["annotations"]:
        x, y, width, height = each["bbox"]
        found[each["image_id"]].append([x, y, x + width, y + height, each["category_id"] - 1])
    arrays = [torch.tensor(each).reshape(-1, 5) for each in found.values()]
    return [array[:, :4] for array in arrays], [array[:, 4].long() for array in arrays]


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, and the Dice loss of the digits (Milletari et al., "V-Net", 2016, arXiv:1606.04797), for they are few pixels."""
    seen = (target != EDGE)[:, None]
    wanted = functional.one_hot(target.where(seen[:, 0], 0), CLASSES).permute(0, 3, 1, 2) * seen
    shares = logits.softmax(dim=1) * seen
    both = 2 * (shares * wanted).sum(dim=(0, 2, 3)) / (shares + wanted).sum(dim=(0, 2, 3)).clamp(min=1)
    return functional.cross_entropy(logits, target, ignore_index=EDGE) + 1 - both[1:].mean()


def deeplab(folder: Path) -> tuple[nn.Module, int, Callable[[Tensor], Tensor]]:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # torchvision's 0.01 is for weeks of training
    x, y = pictures(folder), masks(folder)
    return model, len(x), lambda rows: segmentation_loss(model(x[rows])["out"], y[rows])


def rangeseg(folder: Path) -> tuple[nn.Module, int, Callable[[Tensor], Tensor]]:
    model = deploy.models.create("rangeseg", num_classes=CLASSES)
    feeds = [np.load(file) for file in sorted((folder / "ranges").iterdir())]
    distance, intensity = (torch.from_numpy(np.stack([feed[name] for feed in feeds])) for name in ("distance", "intensity"))
    y = torch.from_numpy(np.stack([feed["label"] for feed in feeds])).long()
    return model, len(y), lambda rows: segmentation_loss(model(distance[rows], intensity[rows]), y[rows])


def detector(folder: Path) -> tuple[nn.Module, int, Callable[[Tensor], Tensor]]:
    model = Detector(len(NAMES), SIDE)
    x, (corners, labels) = pictures(folder), boxes(folder)
    return model, len(x), lambda rows: model.loss(x[rows], [corners[row] for row in rows], [labels[row] for row in rows])


MODELS = {"deeplab": deeplab, "rangeseg": rangeseg, "detector": detector}
STEPS = {"deeplab": 500, "rangeseg": 250, "detector": 400}


def batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """`steps` batches of rows, epoch after epoch in another order."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count)
        yield order[:size]
        order = order[size:]


def train(name: str, folder: Path, steps: int, batch: int = 8, rate: float = 2e-3) -> nn.Module:
    """The model after `steps` batches of Adam with one cycle of the learning rate."""
    torch.manual_seed(0)
    model, count, loss_of = MODELS[name](folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step, rows in enumerate(batches(count, min(batch, count), steps), 1):
        optimizer.zero_grad()
        loss = loss_of(rows)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--scenes", type=Path, default=Path("build/scenes"))
    defaults = ", ".join(f"{name} {steps}" for name, steps in STEPS.items())
    parser.add_argument("--steps", type=int, help=f"batches of 8 scenes (default: {defaults})")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or Path("build") / f"{arguments.model}.pth"
    model = train(arguments.model, arguments.scenes / "train", arguments.steps or STEPS[arguments.model])
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), output)
    print(f"saved {output}")


if __name__ == "__main__":
    main()
