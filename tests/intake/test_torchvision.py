import pytest
import torch
import torchvision

from deploy.errors import UsageError
from deploy.intake.build import build_model
from deploy.intake.torchvision import TorchvisionRecipe


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "inception_v3", "mnasnet0_5"])
def test_classifier_gives_plain_logits_for_its_declared_input(name: str) -> None:
    quick = {"init_weights": False} if name == "inception_v3" else {}
    built, _ = build_model(arch=f"torchvision:{name}", args=quick, num_classes=6)
    assert built.inputs is not None
    (spec,) = built.inputs
    assert str(spec) == f"input: float32 1x3x{'299x299' if name == 'inception_v3' else '224x224'}"
    with torch.no_grad():
        logits = built.module(torch.zeros(2, *map(int, spec.shape[1:])))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 6)
    assert (built.outputs, built.preprocess, built.num_classes) == (("logits",), "imagenet", 6)
    assert (built.source_files, built.folder) == ((), None)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_segmenter_gives_a_plain_tensor_under_its_own_parameter_names(name: str) -> None:
    built, _ = build_model(arch=f"torchvision:{name}", num_classes=3)
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    theirs.load_state_dict(built.module.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built.module(x), theirs(x)["out"])
    assert built.outputs == ("logits",)


def test_auxiliary_head_is_a_second_output() -> None:
    built, _ = build_model(arch="torchvision:deeplabv3_mobilenet_v3_large", args={"aux_loss": True})
    with torch.no_grad():
        logits, aux = built.module(torch.zeros(1, 3, 64, 64))
    assert logits.shape == aux.shape == (1, 21, 64, 64)
    assert built.outputs == ("logits", "aux")


def test_segmenter_exports_with_a_dynamic_batch() -> None:
    built, _ = build_model(arch="torchvision:lraspp_mobilenet_v3_large", num_classes=2)
    x = torch.randn(3, 3, 64, 64)
    program = torch.export.export(built.module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), built.module(x))


def test_input_follows_the_image_size_that_the_net_is_made_for() -> None:
    recipe = TorchvisionRecipe("vit_b_16")
    interface = recipe.describe(torch.nn.Identity(), {"image_size": 32})
    assert [str(spec) for spec in interface.inputs or ()] == ["input: float32 1x3x32x32"]


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "r3d_18", "raft_large", "quantized_resnet18", "ssd300_vgg16"])
def test_models_for_other_tasks_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"torchvision:{name} is a model for .*expected a classifier or a segmenter"):
        TorchvisionRecipe(name)


def test_unknown_model_is_refused_with_near_names() -> None:
    with pytest.raises(UsageError, match=r"torchvision has no model 'resnet19'; did you mean .*'resnet18'"):
        build_model(arch="torchvision:resnet19")


def test_arguments_that_would_download_are_refused() -> None:
    with pytest.raises(UsageError, match="weights='DEFAULT' would download weights; give them with `weights`"):
        build_model(arch="torchvision:resnet18", args={"weights": "DEFAULT"})


def test_argument_that_it_does_not_take_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"cannot build torchvision:resnet18 with .*unexpected keyword argument 'depth'"):
        build_model(arch="torchvision:resnet18", args={"depth": 3})
