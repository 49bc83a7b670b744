import copy
import io
import math

import pytest
import torch
import torchvision
from torch import nn

from deploy.models import ModelError, create
from deploy.models.finetune import freeze, initialize_weights, replace_head


def test_replaced_head_has_the_new_classes_and_leaves_the_rest() -> None:
    module = create("resnet18").eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    head = replace_head(module, 5)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert head is module.get_submodule("fc")
    after = module.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["fc.weight", "fc.bias"]


def test_convolutional_head_is_replaced_with_its_geometry() -> None:
    module = create("rangeseg")
    replace_head(module, 9)
    x = torch.zeros(1, 1, 16, 16)
    assert module(x, x).shape == (1, 9, 16, 16)


def test_head_is_not_taken_for_the_auxiliary_one_that_comes_after_it() -> None:
    module = torchvision.models.get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True)
    replace_head(module, 3)
    assert module.classifier[-1].out_channels == 3
    assert module.aux_classifier[-1].out_channels == 21


def test_named_head_is_replaced_and_a_wrong_name_gets_near_ones() -> None:
    module = create("lenet5")
    with pytest.raises(ModelError, match=r"no linear layer or convolution 'fc4'; did you mean .*'fc3'"):
        replace_head(module, 5, name="fc4")
    with pytest.raises(ModelError, match="no linear layer and no convolution"):
        replace_head(nn.ReLU(), 5)
    with pytest.raises(ModelError, match="num_classes must be 1 or more, not 0"):
        replace_head(module, 0)
    replace_head(module, 4, name="fc3")
    assert module(torch.zeros(1, 1, 28, 28)).shape == (1, 4)


def test_frozen_layers_do_not_train_and_their_batchnorm_stays_in_eval() -> None:
    module = create("resnet18")
    freeze(module, "conv1", "bn1", "layer1")
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in module.named_parameters() if name.startswith(("conv1.", "bn1.", "layer1."))
    }  # not layer2.0.conv1
    module.train()
    module(torch.randn(4, 3, 32, 32))
    assert not module.get_submodule("layer1.0.bn1").training
    assert module.get_submodule("layer2.0.bn1").training
    assert module.get_buffer("layer1.0.bn1.num_batches_tracked") == 0
    assert module.get_buffer("layer2.0.bn1.num_batches_tracked") == 1


def test_frozen_module_can_be_copied_and_saved_whole() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    freeze(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), torch.load(saved, weights_only=False)):
        assert other.train()[1].train() is other[1]
        assert not other[1].training


def test_prefix_that_names_nothing_is_refused_before_anything_is_frozen() -> None:
    module = create("resnet18")
    with pytest.raises(ModelError, match=r"no module or parameter 'layer5'; did you mean .*'layer"):
        freeze(module, "conv1", "layer5")
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_initialized_weights_have_the_variance_of_their_formulas() -> None:
    torch.manual_seed(0)
    conv, deep = nn.Conv2d(16, 64, 3), nn.Conv2d(256, 256, 3, groups=256)
    linear, norm = nn.Linear(300, 100), nn.BatchNorm2d(8)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.fill_(3.0)
    initialize_weights(nn.Sequential(conv, deep, linear, norm))
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert deep.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert linear.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 400), rel=0.01)
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)
    assert all(not bias.any() for bias in (conv.bias, deep.bias, linear.bias, norm.bias, norm.running_mean))
    assert all((ones == 1).all() for ones in (norm.weight, norm.running_var))
