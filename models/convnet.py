"""A small convolutional net for 28 x 28 grey images."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two blocks of convolution, ReLU and pooling with 32 and 64 channels, then 1024 features, 256 and the classes.

    The 5 x 5 convolutions have no padding, which leaves 64 maps of 4 x 4, 1024 features. There is dropout before the linear layers.
    In: N x 1 x 28 x 28 float32. Out: logits, N x num_classes float32.
    Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NeurIPS 2012, for
    the ReLU and the dropout.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(1024, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits
