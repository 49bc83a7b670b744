"""The nets of `int8_accuracy.py`, each with the images that calibrate, choose and judge."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lite0 import PREPROCESS, weights
from torch import nn
from train_fashion import NETS, Net

import deploy
from deploy.artifact.artifact import Artifact
from deploy.calibration.imagefolder import Sample, scan
from deploy.models import registry

IMAGES = 512
"""Images that calibrate, at most."""
PHOTOS_CALIB = 200
FP32 = "fp32"
LITE0 = "efficientnet-lite0"
RESCALED = "rescaled"
NAMES = (*NETS, RESCALED, LITE0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One net with its images. Labels of `choosing` and `judging` are the model's classes.

    calib: an ImageFolder. calibrating: the images of it that every tool takes. choosing: the best peer is the best one on these.
    """

    name: str
    artifact: Artifact
    calib: Path
    calibrating: tuple[Sample, ...]
    choosing: tuple[Sample, ...]
    judging: tuple[Sample, ...]


def rescale(module: nn.Module, seed: int = 0) -> None:
    """Multiply the channels between convolutions by powers of two, in place, without changing the function.

    For nets whose layers follow one another with nothing but ReLU, max(0, x), between them: s max(0, x) = max(0, s x).
    """
    generator = np.random.default_rng(seed)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, after in zip(layers[1::2], layers[2::2], strict=False):
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(after, nn.Conv2d)
            factor = torch.from_numpy(2.0 ** generator.integers(-4, 5, norm.num_features)).float()
            norm.weight *= factor
            norm.bias *= factor
            after.weight /= factor[:, None, None, None] if after.groups > 1 else factor[None, :, None, None]


def fashion_case(name: str, cache: Path, work: Path) -> Case:
    """A net of `train_fashion.py`. The images that choose are those of calib/ that do not calibrate. work: gets the artifact."""
    net: Net = NETS["mobilenet_v1" if name == RESCALED else name]
    options = net.export_options(cache, "mobilenet_v1" if name == RESCALED else name)
    if not options["weights"].exists():
        sys.exit(f"no weights at {options['weights']}: run benchmarks/train_fashion.py first")
    if name == RESCALED:
        module = registry.create(net.arch, num_classes=options["num_classes"], **net.args)
        module.load_state_dict(torch.load(options["weights"], weights_only=True))
        rescale(module)
        options["weights"] = work / "rescaled.pth"
        torch.save(module.state_dict(), options["weights"])
    artifact = deploy.export(work / FP32, **options)
    calib = scan(cache / "calib")
    calibrating = calib.sample(IMAGES)
    return Case(
        name=name,
        artifact=artifact,
        calib=calib.root,
        calibrating=calibrating,
        choosing=tuple(sorted(set(calib.samples) - set(calibrating))),
        judging=scan(cache / "eval").samples,
    )


def photos_case(photos: Path, nets: Path, work: Path) -> Case:
    """EfficientNet-Lite0. There are so few photographs that those which calibrate choose too."""
    if not weights(nets).exists():
        sys.exit(f"no weights at {weights(nets)}: `make peers` installs them, or name their folder with --nets")
    samples = scan(photos).samples
    if len(samples) != 1000 or len({label for _, label in samples}) != 1000:
        sys.exit(f"{photos} must hold 1,000 folders, the ImageNet classes in order, with one photograph each")
    order = np.random.default_rng(0).permutation(1000)
    for index in order[:PHOTOS_CALIB]:
        path, label = samples[index]
        (work / "calib" / f"{label:03}").mkdir(parents=True)
        os.symlink(path.absolute(), work / "calib" / f"{label:03}" / path.name)
    preprocess = work / "preprocess.json"
    preprocess.write_text(json.dumps(PREPROCESS), encoding="utf-8")
    artifact = deploy.export(
        work / FP32,
        model=f"{Path(__file__).with_name('lite0.py')}:lite0",
        model_args={"nets": str(nets.absolute())},
        weights=weights(nets),
        inputs=["input=1x3x224x224"],
        outputs=["logits"],
        preprocess=str(preprocess),
    )
    first = tuple(samples[index] for index in sorted(order[:PHOTOS_CALIB]))
    return Case(
        name=LITE0,
        artifact=artifact,
        calib=work / "calib",
        calibrating=scan(work / "calib").sample(PHOTOS_CALIB),
        choosing=first,
        judging=tuple(samples[index] for index in sorted(order[PHOTOS_CALIB:])),
    )
