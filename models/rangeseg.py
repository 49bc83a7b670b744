"""A segmentation net for range images: two inputs, one dense output."""

import torch
from torch import Tensor, nn

from .initialization import initialize_weights


def _convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class RangeSeg(nn.Module):
    """An encoder-decoder with skip connections on the distance and the intensity image of a spinning lidar.

    In: `distance` and `intensity`, both N x 1 x H x W float32, H and W multiples of 8.
    Out: logits, N x num_classes x H x W float32. By default background, car, pedestrian and cyclist.
    Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, arXiv:1505.04597, for the net; Wu, Wan, Yue, Keutzer, "SqueezeSeg",
    ICRA 2018, arXiv:1710.07368, for the range images.
    """

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.encoder1 = _convs(2, 16)
        self.encoder2 = _convs(16, 32)
        self.encoder3 = _convs(32, 64)
        self.bottom = _convs(64, 128)
        self.pool = nn.MaxPool2d(2)
        self.up3 = nn.ConvTranspose2d(128, 64, kernel_size=2, stride=2)
        self.decoder3 = _convs(128, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, kernel_size=2, stride=2)
        self.decoder2 = _convs(64, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2)
        self.decoder1 = _convs(32, 16)
        self.classifier = nn.Conv2d(16, num_classes, kernel_size=1)
        initialize_weights(self)

    def forward(self, distance: Tensor, intensity: Tensor) -> Tensor:
        fine = self.encoder1(torch.cat([distance, intensity], dim=1))
        middle = self.encoder2(self.pool(fine))
        coarse = self.encoder3(self.pool(middle))
        x = self.bottom(self.pool(coarse))
        x = self.decoder3(torch.cat([self.up3(x), coarse], dim=1))
        x = self.decoder2(torch.cat([self.up2(x), middle], dim=1))
        x = self.decoder1(torch.cat([self.up1(x), fine], dim=1))
        logits: Tensor = self.classifier(x)
        return logits
