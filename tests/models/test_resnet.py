import pytest
import torch
import torchvision

from deploy.models import create


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnet_loads_torchvisions_state_dict_strictly_and_computes_the_same(name: str) -> None:
    theirs = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    ours = create(name, num_classes=10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())  # in its order too
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 70, 96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
