"""A small single-shot detector (Liu et al., "SSD", ECCV 2016, arXiv:1512.02325), written for export.

It gives corners in pixels and logits for every default box; what overlaps is suppressed outside the graph, by `deploy export
--decode ssd`. `loss` is SSD's own: matched boxes by smooth L1, classes by cross-entropy with three hard negatives for each match.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDES = (24.0, 40.0, 56.0)
"""Sides of the square default boxes of every cell, in pixels."""
STRIDE = 8
VARIANCES = (0.1, 0.2)
"""What offsets of the centre, and of the logarithm of the side, are divided by: SSD's own."""
_MATCH, _NEGATIVES = 0.5, 3


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Detector(nn.Module):
    """In: N x 3 x side x side. Out: `boxes` N x A x 4, corners in pixels, and `scores` N x A x (1 + classes), logits."""

    anchors: Tensor

    def __init__(self, num_classes: int = 3, side: int = 128) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(
            _conv(3, 16), _conv(16, 24, 2), _conv(24, 32), _conv(32, 48, 2), _conv(48, 64), _conv(64, 96, 2), _conv(96, 96),
            _conv(96, 96),
        )  # fmt: skip
        self.offsets = nn.Conv2d(96, 4 * len(SIDES), 3, padding=1)
        self.classes = nn.Conv2d(96, (1 + num_classes) * len(SIDES), 3, padding=1)
        centres = (torch.arange(side // STRIDE) + 0.5) * STRIDE
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        cells = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(SIDES), 2)
        sides = torch.tensor(SIDES).reshape(1, -1, 1).expand(len(cells), -1, 2)
        self.register_buffer("anchors", torch.cat([cells, sides], dim=-1).reshape(-1, 4), persistent=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (N, A, 4) from the default boxes, and logits (N, A, 1 + classes)."""
        features = self.backbone(x)
        offsets, logits = self.offsets(features), self.classes(features)
        return (
            offsets.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4),
            logits.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 1 + self.num_classes),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offsets, logits = self.heads(x)
        centre = self.anchors[:, :2] + offsets[..., :2] * VARIANCES[0] * self.anchors[:, 2:]
        half = self.anchors[:, 2:] * torch.exp(offsets[..., 2:] * VARIANCES[1]) / 2
        return torch.cat([centre - half, centre + half], dim=-1), logits

    def loss(self, x: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Of pictures (N, 3, side, side) with corners (n, 4) and indices of classes (n,) each."""
        offsets, logits = self.heads(x)
        wanted = [self._matched(*each) for each in zip(boxes, labels, strict=True)]
        targets, classes = (torch.stack(part) for part in zip(*wanted, strict=True))
        matched = classes > 0
        count = max(int(matched.sum()), 1)
        local = functional.smooth_l1_loss(offsets[matched], targets[matched], reduction="sum")
        losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), classes.reshape(-1), reduction="none")
        flat = matched.reshape(-1)
        hard = losses[~flat].topk(min(_NEGATIVES * count, int((~flat).sum()))).values
        return (local + losses[flat].sum() + hard.sum()) / count

    def _matched(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (A, 4) and classes (A,) with 0 for the background: the best default box of each, and all that overlap by half."""
        anchors = self.anchors
        classes = torch.zeros(len(anchors), dtype=torch.int64)
        if not len(boxes):
            return torch.zeros_like(anchors), classes
        corners = torch.cat([anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2], dim=1)
        low, high = torch.maximum(corners[:, None, :2], boxes[:, :2]), torch.minimum(corners[:, None, 2:], boxes[:, 2:])
        shared = (high - low).clamp(min=0).prod(dim=-1)
        overlap = shared / (anchors[:, None, 2:].prod(dim=-1) + (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) - shared)
        best, nearest = overlap.max(dim=1)
        own = overlap.argmax(dim=0)
        best[own], nearest[own] = 1.0, torch.arange(len(boxes))
        classes = torch.where(best >= _MATCH, labels[nearest] + 1, classes)
        target = boxes[nearest]
        centre, size = (target[:, :2] + target[:, 2:]) / 2, target[:, 2:] - target[:, :2]
        moved = (centre - anchors[:, :2]) / anchors[:, 2:] / VARIANCES[0]
        return torch.cat([moved, torch.log(size / anchors[:, 2:]) / VARIANCES[1]], dim=1), classes
