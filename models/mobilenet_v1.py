"""MobileNet v1, as a classifier and as the feature maps of its first seven stages."""

import torch
from torch import Tensor, nn

from .errors import ModelError
from .initialization import initialize_weights

BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Output channels and stride of the 13 depthwise-separable blocks (paper, table 1)."""


def channels(count: int, width: float) -> int:
    """`count` channels times the width multiplier, at least 8 (paper, section 3.3; the minimum is TensorFlow slim's)."""
    return max(8, int(count * width))


def conv_bn(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU: the stem."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def conv_dw(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise 3 x 3 and a pointwise 1 x 1 convolution, both followed by BatchNorm and ReLU (paper, figure 3)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, kernel_size=3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def stages(count: int, width: float) -> list[nn.Sequential]:
    """The stem and the blocks that follow it, `count` in total. Raises ModelError if the width is not above 0."""
    if not width > 0:
        raise ModelError(f"the width multiplier of mobilenet_v1 must be above 0, not {width}")
    inputs = channels(32, width)
    made = [conv_bn(3, inputs, stride=2)]
    for outputs, stride in BLOCKS[: count - 1]:
        made.append(conv_dw(inputs, channels(outputs, width), stride))
        inputs = channels(outputs, width)
    return made


class MobileNetV1(nn.Module):
    """A stem and 13 depthwise-separable blocks (`model.0` to `model.13`), global average pooling and `fc`.

    In: N x 3 x H x W float32, any size from 32 up (224 in the paper). Out: logits, N x num_classes float32.
    `width` multiplies the channels of every layer.
    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
    arXiv:1704.04861.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        self.model = nn.Sequential(*stages(14, width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels(1024, width), num_classes)
        initialize_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.pool(self.model(x)), 1))
        return logits


class MobileNetV1Features(nn.Module):
    """The stem and the first six blocks of MobileNet v1, `conv1` to `conv7`; returns all seven feature maps.

    In: N x 3 x H x W float32, any size from 16 up. Out: seven float32 maps; with width 1 N x 32 x H/2 x W/2,
    N x 64 x H/2 x W/2, N x 128 x H/4 x W/4 (twice), N x 256 x H/8 x W/8 (twice), N x 512 x H/16 x W/16 (sizes rounded up).
    Its tensors are the first ones of `MobileNetV1`, in the same order. `num_classes` has no effect, because there is no head:
    it is an argument so that all architectures are made in the same way. Paper: see `MobileNetV1`.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.conv7 = stages(7, width)
        initialize_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.conv7):
            x = stage(x)
            maps.append(x)
        return tuple(maps)
