import pytest
import torch

from deploy.models import ModelError, create


def test_tensors_are_named_and_counted_as_in_the_published_layout() -> None:
    names = [name for name in create("mobilenet_v1").state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == 137
    assert names[:2] == ["model.0.0.weight", "model.0.1.weight"]
    assert names[-3:] == ["model.13.4.running_var", "fc.weight", "fc.bias"]


def test_features_are_those_of_the_stem_and_the_first_six_blocks() -> None:
    whole, features = create("mobilenet_v1").eval(), create("mobilenet_v1_features").eval()
    state = list(whole.state_dict().values())[: len(features.state_dict())]
    features.load_state_dict(dict(zip(features.state_dict(), state, strict=True)))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = features(x)
        assert [tuple(m.shape[1:]) for m in maps] == [
            (32, 32, 48), (64, 32, 48), (128, 16, 24), (128, 16, 24), (256, 8, 12), (256, 8, 12), (512, 4, 6),
        ]  # fmt: skip
        y = x
        for index, found in enumerate(maps):
            y = whole.get_submodule(f"model.{index}")(y)
            assert torch.equal(found, y)


def test_width_multiplies_the_channels() -> None:
    half = create("mobilenet_v1", width=0.5, num_classes=3)
    assert half.get_parameter("model.0.0.weight").shape == (16, 3, 3, 3)
    assert half.get_parameter("fc.weight").shape == (3, 512)
    assert create("mobilenet_v1", width=0.01).get_parameter("model.0.0.weight").shape[0] == 8
    with pytest.raises(ModelError, match="width multiplier of mobilenet_v1 must be above 0, not 0"):
        create("mobilenet_v1", width=0)
