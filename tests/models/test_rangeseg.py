"""The segmentation net of two inputs."""

import torch

from deploy.models import create


def test_rangeseg_gives_logits_for_every_pixel_of_two_inputs() -> None:
    module = create("rangeseg", num_classes=5).eval()
    distance, intensity = torch.randn(2, 1, 16, 40), torch.randn(2, 1, 16, 40)
    with torch.no_grad():
        logits = module(distance, intensity)
        assert logits.shape == (2, 5, 16, 40)
        assert not torch.equal(logits, module(distance, intensity + 1))
        assert not torch.equal(logits, module(distance + 1, intensity))
