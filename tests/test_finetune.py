"""Weights of another net, a new head, frozen layers."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from deploy.errors import CheckpointError, UsageError
from deploy.finetune import freeze, load_weights, replace_head
from deploy.models import create


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
    with pytest.raises(UsageError, match=r"no linear layer or convolution 'fc4'; did you mean .*'fc3'"):
        replace_head(module, 5, name="fc4")
    with pytest.raises(UsageError, match="no linear layer and no convolution"):
        replace_head(nn.ReLU(), 5)
    with pytest.raises(UsageError, match="num_classes must be 1 or more, not 0"):
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
    with pytest.raises(UsageError, match=r"no module or parameter 'layer5'; did you mean .*'layer"):
        freeze(module, "conv1", "layer5")
    assert all(parameter.requires_grad for parameter in module.parameters())


class Backbone(nn.Module):
    """The first seven blocks of MobileNet v1, as a project of one's own may write them: every name is another."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
        self.stem = self.unit(3, 32, 3, 2)
        inputs = 32
        self.stages = nn.ModuleList()
        for outputs, stride in sizes:
            self.stages.append(
                nn.ModuleDict({"spatial": self.unit(inputs, inputs, 3, stride, inputs), "mix": self.unit(inputs, outputs, 1, 1)})
            )
            inputs = outputs

    @staticmethod
    def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage["mix"](stage["spatial"](x))  # type: ignore[index]
        return x


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A MobileNet v1 with running statistics of its own, and its checkpoint as a training program saves it."""
    torch.manual_seed(0)
    net = create("mobilenet_v1")
    net(torch.randn(2, 3, 64, 64))
    path = tmp_path_factory.mktemp("mobilenet") / "mobilenet_v1.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, path)
    return net.eval(), path


def test_first_blocks_of_a_checkpoint_with_other_names_become_a_feature_extractor(mobilenet: tuple[nn.Module, Path]) -> None:
    whole, path = mobilenet
    net = Backbone().eval()
    report = load_weights(net, path, match="order")
    assert len(report.loaded) == 65
    assert len(report.loaded) + len(report.unexpected) == 137
    assert report.summary().startswith("65 of 65 tensors loaded by order; from 'state_dict'; 72 more in the checkpoint not used")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(images), whole.get_submodule("model")[:7](images))  # type: ignore[index]


def test_a_file_a_path_in_text_and_a_state_dict_are_loaded_alike(mobilenet: tuple[nn.Module, Path]) -> None:
    whole, path = mobilenet
    expected = whole.state_dict()
    for weights in (path, str(path), expected):
        net = create("mobilenet_v1")
        assert load_weights(net, weights).complete
        assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items() if "num_" not in name)


def test_weights_that_do_not_fit_are_refused_and_in_part_loaded_when_asked(mobilenet: tuple[nn.Module, Path]) -> None:
    _, path = mobilenet
    net = create("mobilenet_v1", num_classes=10)
    with pytest.raises(
        CheckpointError, match=r"fc.weight is 1000x1024, expected 10x1024, .*\nTry: the architecture .*, or `allow_partial`"
    ):
        load_weights(net, path)
    report = load_weights(net, path, allow_partial=True)
    assert [mismatch.name for mismatch in report.mismatched] == ["fc.weight", "fc.bias"]
    assert len(report.loaded) == 135
    with pytest.raises(CheckpointError, match="no tensor of the checkpoint has a shape of this one's"):
        load_weights(nn.Linear(7, 3), path, allow_partial=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_weights(net, path.with_name("other.pth"))
    with pytest.raises(UsageError, match="unknown match 'size'"):
        load_weights(net, path, match="size")  # type: ignore[arg-type]


def test_a_net_of_depth_and_intensity_learns_from_long_labels_of_every_pixel() -> None:
    torch.manual_seed(0)
    trained = create("rangeseg", num_classes=4)
    net = create("rangeseg", num_classes=4)
    load_weights(net, trained.state_dict())
    replace_head(net, 3)
    freeze(net, "encoder1", "encoder2")
    depth, intensity = torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)
    labels = (depth[:, 0] > 0.5).long() + (intensity[:, 0] > 0.5).long()
    assert (labels.shape, labels.dtype) == ((4, 32, 32), torch.int64)
    optimizer = torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(net.train()(depth, intensity), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in trained.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor) is name.startswith(("encoder1.", "encoder2.")), name
