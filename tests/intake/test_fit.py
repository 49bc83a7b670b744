from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from deploy.errors import CheckpointError
from deploy.intake.fit import StateDict, infer_num_classes, load_weights
from deploy.intake.weightsfile import load_saved, save_weights
from deploy.models import create


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy, with BatchNorm statistics that are not those of a new module."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor + torch.arange(tensor.numel()).reshape(tensor.shape) / tensor.numel()
    return state


def is_loaded(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items() if name in state)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model.", "net."]
)
@pytest.mark.parametrize("name", ["lenet5", "mobilenet_v1"])
def test_wrappers_prefixes_are_stripped_as_far_as_the_names_then_match(name: str, prefix: str) -> None:
    # MobileNet's own names begin with `model.`, which must stay.
    module = create(name, num_classes=3)
    state = state_of(module)
    report = load_weights(module, {prefix + key: tensor for key, tensor in state.items()})
    assert is_loaded(module, state)
    assert "".join(report.stripped) == prefix
    assert report.complete
    assert not report.unexpected


def test_prefixes_left_in_the_middle_of_names_are_taken_out() -> None:
    module = torchvision.models.get_model("alexnet", weights=None, num_classes=2)  # often trained with parallel features
    state = state_of(module)
    report = load_weights(module, {key.replace("features.", "features.module."): tensor for key, tensor in state.items()})
    assert is_loaded(module, state)
    assert report.stripped == (".module.",)


def test_prefix_is_stripped_where_other_tensors_of_the_training_module_lack_it() -> None:
    module = create("lenet5")
    state = {f"model.{key}": tensor for key, tensor in state_of(module).items()}
    with pytest.raises(CheckpointError, match=r"1 unexpected.*\n.*criterion.weight"):
        load_weights(module, {**state, "criterion.weight": torch.ones(10)})
    report = load_weights(module, {**state, "criterion.weight": torch.ones(10)}, allow_partial=True)
    assert report.complete
    assert report.unexpected == ("criterion.weight",)


def test_prefix_stays_where_two_names_would_become_one() -> None:
    state = {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2), "bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="1 missing, 2 unexpected") as caught:
        load_weights(nn.Linear(2, 2), state)
    assert "taken off" not in str(caught.value)


def test_no_prefix_is_stripped_where_that_makes_nothing_match() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): module.other"):
        load_weights(nn.Linear(2, 2), {"module.other": torch.ones(2)})


def test_checkpoint_without_num_batches_tracked_is_complete() -> None:
    module = create("mobilenet_v1_features")
    state = {key: tensor for key, tensor in state_of(module).items() if not key.endswith("num_batches_tracked")}
    report = load_weights(module, state)
    assert len(report.loaded) == len(state) == 65
    assert report.complete
    assert is_loaded(module, state)


def test_counters_that_the_module_lacks_are_not_unexpected() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1))
    state = state_of(module)
    assert not load_weights(module, {**state, "1.num_batches_tracked": torch.tensor(3)}).unexpected


def test_half_checkpoint_loads_into_a_float32_module() -> None:
    module = create("lenet5")
    state = {key: tensor.half() for key, tensor in state_of(module).items()}
    load_weights(module, state)
    assert all(tensor.dtype == torch.float32 for tensor in module.state_dict().values())
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in module.state_dict().items())


def test_error_counts_and_lists_what_does_not_fit_with_both_shapes() -> None:
    state = state_of(create("resnet34", num_classes=10))
    del state["fc.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_weights(create("resnet18"), {f"module.{key}": tensor for key, tensor in state.items()})
    text = str(caught.value)
    assert "does not fit ResNet by name: 1 missing, 80 unexpected, 1 of another shape (prefix 'module.' taken off)" in text
    assert "missing (1): fc.bias" in text
    assert "and 70 more" in text  # ten of 80
    assert text.count("layer1.2.") == 10
    assert "fc.weight is 10x512, expected 1000x512" in text
    assert "Try: " in text


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda s: {**s, "fc3.weight": torch.ones(7, 84), "fc3.bias": torch.ones(7)}, "`num_classes` 7"),
        (lambda s: {f"layer{index}": tensor for index, tensor in enumerate(s.values())}, "`match` order, by which all 10"),
        (lambda s: {**s, "extra": torch.ones(1)}, "`allow_partial`"),
        (lambda s: {"other.weight": torch.ones(3)}, "another architecture"),
        (lambda s: {**s, "conv2.weight": torch.ones(16, 6, 3, 3)}, "the architecture and the arguments"),
    ],
)
def test_error_says_what_to_try(change: object, advice: str) -> None:
    module = create("lenet5")
    with pytest.raises(CheckpointError, match=f"Try: .*{advice}"):
        load_weights(module, change(state_of(module)))  # type: ignore[operator]


def test_partial_load_takes_what_fits_and_reports_the_rest() -> None:
    module = create("lenet5")
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = state_of(module)
    del state["conv1.bias"]
    report = load_weights(module, {**state, "fc3.weight": torch.ones(7, 84), "more": torch.ones(1)}, allow_partial=True)
    assert len(report.loaded) == 8
    assert (report.missing, report.unexpected) == (("conv1.bias",), ("more",))
    assert [str(mismatch) for mismatch in report.mismatched] == ["fc3.weight is 7x84, expected 10x84"]
    after = module.state_dict()
    assert all(torch.equal(after[name], kept[name]) for name in ("conv1.bias", "fc3.weight"))
    assert all(torch.equal(after[name], state[name]) for name in report.loaded)
    summary = report.summary()
    assert summary.startswith("8 of 10 tensors loaded by name; 1 missing (conv1.bias)")
    assert "1 more in the checkpoint not used (more)" in summary


def test_partial_load_of_nothing_is_still_an_error() -> None:
    with pytest.raises(CheckpointError, match="10 missing"):
        load_weights(create("lenet5"), {"x": torch.ones(1)}, allow_partial=True)


def test_integers_are_not_taken_for_floats() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="weight is 2x2 of integers, expected 2x2"):
        load_weights(module, {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)})


def old_mobilenet() -> dict[str, torch.Tensor]:
    """137 tensors with names of another code base, trained in parallel, before counters were kept."""
    state = state_of(create("mobilenet_v1"))
    values = [tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")]
    return OrderedDict((f"module.net.tensor{index}", tensor) for index, tensor in enumerate(values))


def test_order_takes_65_of_the_137_tensors_of_an_old_mobilenet_onto_its_first_stages() -> None:
    state = old_mobilenet()
    assert len(state) == 137
    module = create("mobilenet_v1_features")
    report = load_weights(module, state, match="order")
    assert len(report.loaded) == 65
    assert len(report.unexpected) == 72
    assert report.complete
    names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    for name, tensor in zip(names, state.values(), strict=False):
        assert torch.equal(module.state_dict()[name], tensor)
    assert report.summary().startswith(
        "65 of 65 tensors loaded by order; 72 more in the checkpoint not used (module.net.tensor65"
    )


def test_order_ignores_counters_on_both_sides() -> None:
    source, module = create("mobilenet_v1", num_classes=3), create("mobilenet_v1", num_classes=3)
    state = state_of(source)
    load_weights(module, {f"x{index}": tensor for index, tensor in enumerate(state.values()) if tensor.dim()}, match="order")
    with_counters = {f"x{key}": tensor for key, tensor in state.items()}
    load_weights(module, with_counters, match="order")
    assert is_loaded(module, {key: tensor for key, tensor in state.items() if tensor.dim()})


def test_order_refuses_shapes_that_do_not_fit_and_takes_none_behind_them_in_part() -> None:
    state = {f"x{index}": tensor for index, tensor in enumerate(state_of(create("lenet5")).values())}
    state["x4"] = torch.ones(3, 3)
    with pytest.raises(
        CheckpointError, match=r"by order: 5 missing, 5 unexpected, 1 of another shape(.|\n)*fc1.weight \(x4\) is 3x3"
    ):
        load_weights(create("lenet5"), state, match="order")
    module = create("lenet5")
    kept = module.fc1.bias.clone()
    report = load_weights(module, state, match="order", allow_partial=True)
    assert report.loaded == ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
    assert torch.equal(module.fc1.bias, kept)


def test_order_refuses_a_checkpoint_that_is_too_short() -> None:
    state = dict(list(state_of(create("lenet5")).items())[:6])
    with pytest.raises(CheckpointError, match=r"4 missing.*\n.*fc2.weight"):
        load_weights(create("lenet5"), state, match="order")


def test_order_refuses_safetensors_which_are_sorted() -> None:
    state = StateDict(state_of(create("lenet5")), ordered=False)
    with pytest.raises(CheckpointError, match="safetensors sorts its tensors"):
        load_weights(create("lenet5"), state, match="order")


def test_number_of_classes_is_read_from_the_head_by_name_and_by_order() -> None:
    state = state_of(create("mobilenet_v1", num_classes=17))
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    renamed = {f"x{index}": tensor for index, tensor in enumerate(state.values()) if tensor.dim()}
    assert infer_num_classes(create("mobilenet_v1"), parallel) == 17
    assert infer_num_classes(create("mobilenet_v1"), renamed, "order") == 17
    assert infer_num_classes(create("mobilenet_v1", num_classes=17), parallel) == 17


def test_number_of_classes_is_read_where_several_heads_agree() -> None:
    def deeplab(num_classes: int) -> nn.Module:
        return torchvision.models.get_model(  # type: ignore[no-any-return]
            "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True
        )

    assert infer_num_classes(deeplab(21), state_of(deeplab(5))) == 5


def test_no_number_of_classes_is_read_from_another_architecture() -> None:
    assert infer_num_classes(create("resnet50"), state_of(create("resnet34"))) is None
    assert infer_num_classes(create("lenet5"), {"x": torch.ones(3)}) is None


def test_versions_of_modules_survive_reading_so_that_torch_translates_no_new_layout(tmp_path: Path) -> None:
    # MNASNet rebuilds its stem when the checkpoint does not say its version.
    source = torchvision.models.get_model("mnasnet0_5", weights=None, num_classes=2)
    state = source.state_dict()
    metadata = {f"module.{name}" if name else "module": value for name, value in state._metadata.items()}
    parallel = StateDict({f"module.{key}": tensor for key, tensor in state.items()}, metadata={"": {}, **metadata})
    module = torchvision.models.get_model("mnasnet0_5", weights=None, num_classes=2)
    assert load_weights(module, parallel).complete
    load_weights(module, StateDict(state, ordered=False))  # as of safetensors, which keep no versions
    save_weights(source, tmp_path / "w.safetensors")
    load_saved(module, tmp_path / "w.safetensors")
    assert is_loaded(module, dict(state))


def test_lazy_layers_take_their_shape_from_the_checkpoint() -> None:
    module = nn.LazyLinear(3)
    assert load_weights(module, {"weight": torch.ones(3, 5), "bias": torch.ones(3)}).complete
    assert torch.equal(module.weight, torch.ones(3, 5))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.complex64, "complex64"), (torch.int32, "integers"), (torch.bool, "bool")])
def test_numbers_that_are_no_floats_are_named(dtype: torch.dtype, kind: str) -> None:
    state = {**nn.Linear(2, 2).state_dict(), "weight": torch.ones(2, 2).to(dtype)}
    with pytest.raises(CheckpointError, match=f"1 of another type\n.*weight is 2x2 of {kind}, expected 2x2"):
        load_weights(nn.Linear(2, 2), state)


def test_number_of_classes_is_advised_only_where_it_was_found_to_fit() -> None:
    state = {**state_of(create("lenet5")), "fc3.weight": torch.ones(7, 84), "fc3.bias": torch.ones(7)}
    asked = []
    with pytest.raises(CheckpointError) as caught:
        load_weights(create("lenet5"), state, fits_with=lambda classes: bool(asked.append(classes)))
    assert asked == [7]
    assert "num_classes" not in str(caught.value)


def test_nothing_is_advised_where_nothing_is_known_to_help() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {f"{word}.{kind}": torch.ones(4, 4)[:, 0] if kind == "b" else torch.ones(4, 4) for word in "xy" for kind in "wb"}
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, state)
    assert "Try" not in str(caught.value)


def test_shard_without_an_index_is_said_to_be_one() -> None:
    state = StateDict({"weight": torch.ones(2, 2)}, path=Path("model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors \(shard 1 of 3\) does not fit"):
        load_weights(nn.Linear(2, 2), state)
