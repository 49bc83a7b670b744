import sys

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image

from deploy.artifact.preprocess import Preprocess
from deploy.errors import FactoryError, UsageError
from deploy.intake.build import build_model
from deploy.intake.timm import eval_preprocess


def test_input_and_preprocessing_are_those_of_timms_own_configuration() -> None:
    built, _ = build_model(arch="timm:mobilevitv2_050", num_classes=4)
    assert [str(spec) for spec in built.inputs or ()] == ["input: float32 1x3x256x256"]
    assert isinstance(built.preprocess, Preprocess)
    assert built.preprocess.mean == (0.0, 0.0, 0.0)  # not ImageNet's
    with torch.no_grad():
        assert built.module(torch.zeros(2, 3, 256, 256)).shape == (2, 4)
    assert (built.outputs, built.num_classes) == (("logits",), 4)


@pytest.mark.parametrize(
    "name", ["mobilevitv2_050", "resnet18", "tf_efficientnetv2_b3", "dm_nfnet_f0", "vit_base_patch16_sapiens2"]
)
def test_preprocessing_equals_timms_transform(name: str) -> None:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    _, height, width = config["input_size"]
    ours = eval_preprocess(config, height, width)
    assert ours is not None
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((350, 280))
    expected = timm.data.create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(torch.from_numpy(ours(image)), expected, rtol=0, atol=1e-5)


def test_preprocessing_with_borders_is_left_to_the_user() -> None:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("deepseek_vit_412m").to_dict())
    assert eval_preprocess(config, 546, 546) is None


def test_image_size_and_channels_follow_the_arguments() -> None:
    built, _ = build_model(arch="timm:test_vit", args={"img_size": 96, "in_chans": 1})
    assert [str(spec) for spec in built.inputs or ()] == ["input: float32 1x1x96x96"]
    assert built.preprocess is None
    with torch.no_grad():
        built.module(torch.zeros(1, 1, 96, 96))


def test_default_number_of_classes_is_the_models() -> None:
    assert build_model(arch="timm:test_vit")[0].num_classes == 1000


@pytest.mark.parametrize("name", ["resnet19", "hf-hub:timm/resnet18", "hf_hub:x/y", "local-dir:/tmp"])
def test_unknown_model_or_address_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"timm has no model '{name}'"):
        build_model(arch=f"timm:{name}")


def test_pretrained_weights_are_not_downloaded() -> None:
    with pytest.raises(UsageError, match="pretrained=True would download weights"):
        build_model(arch="timm:test_vit", args={"pretrained": True})


def test_argument_that_it_does_not_take_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"cannot build timm:test_vit with .*nonsense"):
        build_model(arch="timm:test_vit", args={"nonsense": 3})


def test_missing_timm_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "deploy.intake.timm", raising=False)
    with pytest.raises(FactoryError, match="needs timm, which is not installed: pip install timm"):
        build_model(arch="timm:test_vit")
