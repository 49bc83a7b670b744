"""Trains reference architectures on Fashion-MNIST, for the INT8 accuracy benchmark.

    python benchmarks/train_fashion.py --data /usr/share/datasets/fashion-mnist [--cache build/fashion] [NET]...

DATA holds the four .gz files of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; Debian's package
dataset-fashion-mnist has them). CACHE gets two ImageFolders, calib/ (images of the training set that no training sees)
and eval/ (the test set), and a state_dict, NET.pth, with NET.preprocess.json for each net. Files that exist are kept.
The same seed on the same machine gives the same weights.
"""

import argparse
import gzip
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outliers import plant, with_constant_norms
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from deploy.artifact.preprocess import Preprocess
from deploy.intake.build import build_model
from deploy.models import registry

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CALIBRATION = 2000
"""The last images of the training set, kept from training."""
STATISTICS = 256
"""Images that the constant deviations of norms are taken from."""
PLANTED = (17, 71)
"""The channels that become outliers."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net and its training. arch: as in `deploy export --arch`. side: height and width of the input in pixels. images: how many of the training set are used.

    start: the net whose trained weights it begins with. outliers: how many times the others two channels of its residual
    stream are to be, see `outliers.py`; 0 for none.
    """

    arch: str
    args: dict[str, Any] = field(default_factory=dict)
    side: int = 28
    channels: int = 1
    epochs: int
    images: int = 58_000
    batch: int = 128
    rate: float = 2e-3
    start: str = ""
    outliers: float = 0

    @property
    def preprocess(self) -> Preprocess:
        # Mean and standard deviation of the 60,000 training images.
        mean, std = (0.2860,) * self.channels, (0.3530,) * self.channels
        return Preprocess(resize=self.side, crop=self.side, mean=mean, std=std, channels=self.channels)  # type: ignore[arg-type]

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (1, self.channels, self.side, self.side)

    def export_options(self, cache: Path, name: str) -> dict[str, Any]:
        """Arguments of `deploy.export` for the net as trained."""
        return {
            "arch": self.arch,
            "model_args": self.args,
            "num_classes": len(CLASSES),
            "weights": cache / f"{name}.pth",
            "inputs": ["input=" + "x".join(map(str, self.input_shape))],
            "preprocess": str(cache / f"{name}.preprocess.json"),
        }


_VIT = {"img_size": 64, "in_chans": 1, "patch_size": 16, "embed_dim": 96, "depth": 6, "num_heads": 3}

NETS = {
    "lenet5": Net(arch="lenet5", epochs=8),
    "convnet": Net(arch="convnet", epochs=5),
    "mobilenet_v1": Net(arch="mobilenet_v1", args={"width": 0.25}, side=64, channels=3, epochs=4, rate=6e-3),
    "resnet18": Net(arch="resnet18", side=32, channels=3, epochs=3, images=40_000, rate=1e-3),
    "vit": Net(arch="timm:vit_tiny_patch16_224", args=_VIT, side=64, epochs=8),
    "vit_outliers": Net(arch="timm:vit_tiny_patch16_224", args=_VIT, side=64, epochs=1, rate=2e-4, start="vit", outliers=1000),
    "mobilenet_v2": Net(arch="torchvision:mobilenet_v2", side=64, channels=3, epochs=3, images=30_000),
    "mobilenet_v3_small": Net(arch="torchvision:mobilenet_v3_small", side=64, channels=3, epochs=5, images=40_000),
    "efficientnet_b0": Net(
        arch="torchvision:efficientnet_b0",
        args={"stochastic_depth_prob": 0.0, "dropout": 0.0},  # the training is too short to overfit
        side=48,
        channels=3,
        epochs=4,
        images=24_000,
    ),
}


def read(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 28, 28) and labels (N,), both uint8, of `train` or `t10k`."""
    images = gzip.decompress((data / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for label, name in enumerate(CLASSES):
        (root / f"{label}-{name}").mkdir(parents=True, exist_ok=True)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(pixels).save(root / f"{label}-{CLASSES[label]}" / f"{index:05}.png", compress_level=1)


def prepare(net: Net, images: np.ndarray) -> Tensor:
    """(N, 1, side, side) float32: one channel, because the others are the same."""
    preprocess = net.preprocess
    return torch.from_numpy(np.stack([preprocess(Image.fromarray(pixels))[:1] for pixels in images]))


def build(net: Net, cache: Path, seed: int) -> nn.Module:
    """The module, with random weights or those of `net.start`."""
    if net.arch in registry.ARCHITECTURES:
        return registry.create(net.arch, num_classes=len(CLASSES), **net.args)
    module = build_model(arch=net.arch, args=net.args, num_classes=len(CLASSES), seed=seed)[0].module
    if net.start:
        module.load_state_dict(torch.load(cache / f"{net.start}.pth", weights_only=True))
    return module


def train(name: str, net: Net, data: Path, cache: Path, seed: int = 0) -> tuple[nn.Module, float]:
    """The trained module, in evaluation mode, and its accuracy on the test set, 0 to 1. cache: has the weights of `net.start`."""
    torch.manual_seed(seed)
    pixels, labels = (part[: net.images] for part in read(data, "train"))
    images, targets = prepare(net, pixels), torch.from_numpy(labels.astype(np.int64))
    model = build(net, cache, seed)
    if net.outliers:
        with_constant_norms(model, images[:STATISTICS])
    model = model.to(memory_format=torch.channels_last)  # on a CPU two to three times as fast where layers are depthwise
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = len(images) // net.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, net.rate, total_steps=net.epochs * steps)
    for epoch in range(net.epochs):
        model.train()
        start = time.perf_counter()
        for part in torch.randperm(len(images))[: steps * net.batch].split(net.batch):
            flip = torch.rand(len(part), 1, 1, 1) < 0.5
            x = torch.where(flip, images[part].flip(-1), images[part]).expand(-1, net.channels, -1, -1)
            loss = functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), targets[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}: epoch {epoch + 1}/{net.epochs}, {time.perf_counter() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    if net.outliers:
        plant(model, net.outliers, PLANTED)
    model = model.to(memory_format=torch.contiguous_format).eval()
    pixels, labels = read(data, "t10k")
    with torch.inference_mode():
        predicted = torch.cat(
            [model(x.expand(-1, net.channels, -1, -1)).argmax(1) for x in prepare(net, pixels).split(500)]
        )  # fmt: skip
    return model, float((predicted.numpy() == labels).mean())


def ensure_folders(data: Path, cache: Path) -> None:
    for split, part, name in (("train", slice(-CALIBRATION, None), "calib"), ("t10k", slice(None), "eval")):
        if not (cache / name).is_dir():
            images, labels = read(data, split)
            write_folder(cache / f".{name}", images[part], labels[part])
            (cache / f".{name}").rename(cache / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help=f"of {', '.join(NETS)} (default: all)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four .gz files")
    parser.add_argument("--cache", type=Path, default=Path("build/fashion"), help="default: %(default)s")
    options = parser.parse_args()
    ensure_folders(options.data, options.cache)
    for name in options.nets or NETS:
        weights = options.cache / f"{name}.pth"
        if weights.exists():
            continue
        start = time.perf_counter()
        model, accuracy = train(name, NETS[name], options.data, options.cache)
        (options.cache / f"{name}.preprocess.json").write_text(json.dumps(NETS[name].preprocess.to_json()), encoding="utf-8")
        torch.save(model.state_dict(), weights.with_suffix(".partial"))
        weights.with_suffix(".partial").rename(weights)
        print(f"{weights}: {100 * accuracy:.2f} % of the test images, in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
