"""Pairing on small modules: names with prefixes of any name, and order where names say nothing or say otherwise."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from deploy.errors import CheckpointError
from deploy.intake.fit import load_weights
from deploy.intake.pairing import certain, contradiction, pair_tensors, tensors_of

State = dict[str, Tensor]


class Heads(nn.Module):
    """Linear layers of one shape, by name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(4, 4))


def layers(count: int, *names: str, key: str = "layers", start: int = 0) -> nn.Module:
    return nn.ModuleDict({key: nn.ModuleDict({str(start + index): Heads(*names) for index in range(count)})})


def is_loaded(module: nn.Module, source: nn.Module) -> bool:
    pairs = zip(module.state_dict().values(), source.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"backbone.{name}",
        lambda name: f"net_g.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: f"_forward_module.student._orig_mod.{name}",
        lambda name: name.replace("layer2.", "layer2._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module.a.b." + name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module._orig_mod."),
        lambda name: ("head." if name.startswith("fc") else "backbone.") + name,
        lambda name: f"layer1.{name}",  # which begins like names of the module
    ],
)
def test_prefixes_of_any_name_are_found_by_matching(rename: Callable[[str], str]) -> None:
    source, module = resnet(), resnet()
    state = {rename(name): tensor for name, tensor in reversed(source.state_dict().items())}  # in any order
    assert load_weights(module, state).complete
    assert is_loaded(module, source)


@pytest.mark.parametrize("prefixes", [("student", "teacher"), ("gen.module", "critic.module", "old")])
def test_of_several_sets_of_names_none_is_guessed(prefixes: tuple[str, ...]) -> None:
    state = {f"{prefix}.{name}": tensor for prefix in prefixes for name, tensor in Heads("q", "k").state_dict().items()}
    with pytest.raises(CheckpointError, match="several sets of weights: .*" + ".*".join(sorted(prefixes, key=len))):
        load_weights(Heads("q", "k"), state, allow_partial=True)


def test_trained_names_come_before_their_average() -> None:
    source = Heads("q", "k")
    state = {f"{prefix}.{name}": tensor for prefix in ("ema", "model") for name, tensor in source.state_dict().items()}
    module = Heads("q", "k")
    assert load_weights(module, state, allow_partial=True).stripped == ("model.",)


def test_prefix_is_chosen_by_shapes_where_names_are_those_of_many_layers() -> None:
    source, module = resnet(), nn.Linear(512, 3)
    report = load_weights(module, source.state_dict(), allow_partial=True)
    assert report.stripped == ("fc.",)
    assert torch.equal(module.weight, source.fc.weight)  # type: ignore[union-attr,arg-type]
    with pytest.raises(CheckpointError) as caught:  # of equal layers none
        load_weights(nn.BatchNorm1d(7), source.state_dict())
    assert "taken off" not in str(caught.value)


def opaque(state: State) -> State:
    return {f"tensor{index}": tensor for index, tensor in enumerate(state.values())}


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnet18", "mnasnet0_5"])
@pytest.mark.parametrize("counters", ["kept", "dropped", "one-dimensional", "half"])
def test_order_passes_over_counters_that_only_their_shape_tells(arch: str, counters: str) -> None:
    source, module = (torchvision.models.get_model(arch, num_classes=3) for _ in range(2))
    state = opaque(source.state_dict())
    if counters == "dropped":
        state = {name: tensor for name, tensor in state.items() if tensor.dim()}
    elif counters == "one-dimensional":
        state = {name: tensor if tensor.dim() else tensor[None] for name, tensor in state.items()}
    elif counters == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
        source.half().float()
    assert load_weights(module, state, match="order").complete
    with torch.no_grad():
        source.eval(), module.eval()
        assert torch.equal(module(torch.ones(1, 3, 32, 32)), source(torch.ones(1, 3, 32, 32)))


class Counting(nn.Module):
    """A whole number and a float of its own, beside weights."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(steps))
        self.register_buffer("scale", torch.tensor(float(steps)))
        self.last = nn.Linear(4, 2)


def test_order_loads_whole_numbers_that_are_there_and_names_those_that_are_kept() -> None:
    module = Counting(1)
    assert load_weights(module, opaque(Counting(7).state_dict()), match="order").kept == ()
    assert (int(module.steps), float(module.scale)) == (7, 7.0)  # type: ignore[arg-type]
    without = {name: tensor for name, tensor in Counting(9).state_dict().items() if name != "steps"}
    report = load_weights(module, opaque(without), match="order")
    assert (int(module.steps), float(module.scale)) == (7, 9.0)  # type: ignore[arg-type]
    assert report.complete
    assert "1 not in the checkpoint kept as they were (steps)" in report.summary()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (Heads("q", "k", "v"), Heads("k", "v", "q")),
        (Heads("q", "k", "v", "out"), Heads("k", "v", "q", "proj")),
        (Heads("q", "k"), Heads("v", "q", "k")),  # one too many
        (layers(3, "q", "k", "v"), layers(3, "k", "v", "q", key="h", start=1)),
        (layers(3, "a"), nn.ModuleDict({"h": nn.ModuleDict({index: Heads("a") for index in ("0", "10", "1", "2")})})),
    ],
    ids=["rotated", "one renamed", "one too many", "in each layer", "sorted as text"],
)
def test_order_is_not_taken_where_the_ends_of_names_contradict_it(module: nn.Module, source: nn.Module) -> None:
    if isinstance(source, nn.ModuleDict) and "10" in source.get_submodule("h")._modules:
        module = layers(11, "a")
        names = sorted(layers(11, "a", key="h").state_dict(), key=lambda name: (name.split(".")[1], name.endswith("bias")))
        state = {name: torch.zeros(4, 4) if name.endswith("weight") else torch.zeros(4) for name in names}
    else:
        state = dict(source.state_dict())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for allow_partial in (False, True):
        with pytest.raises(CheckpointError, match=r"by order: .* would become .* their order is not the same"):
            load_weights(module, {f"x.{name}": t for name, t in state.items()}, match="order", allow_partial=allow_partial)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


NORMS = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.LayerNorm(4)})  # a.weight, a.bias, b.weight, b.bias: all of one shape

MISLED: dict[str, tuple[nn.Module, list[str], bool]] = {
    "gamma and beta": (nn.LayerNorm(4), ["ln.gamma", "ln.beta"], False),
    "beta and gamma": (nn.LayerNorm(4), ["ln.beta", "ln.gamma"], True),
    "statistics of TensorFlow": (
        nn.BatchNorm1d(4, affine=False, momentum=None), ["bn.moving_variance", "bn.moving_mean"], True
    ),
    "each layer whole": (NORMS, ["x.weight", "x.bias", "y.weight", "y.bias"], False),
    "two layers mixed": (NORMS, ["x.weight", "y.bias", "y.weight", "x.bias"], True),
    "two layers mixed, in TensorFlow's words": (NORMS, ["x.gamma", "y.beta", "y.gamma", "x.beta"], True),
    "a layer in two parts": (NORMS, ["x.w.weight", "x.b.bias", "y.w.weight", "y.b.bias"], False),
    "numbers that grow": (NORMS, ["n3.weight", "n3.bias", "n5.weight", "n5.bias"], False),
    "numbers that fall": (NORMS, ["n5.weight", "n5.bias", "n3.weight", "n3.bias"], False),  # a and b have none to compare
    "sizes of kernels": (
        nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)), ["n3x3.weight", "n3x3.bias", "n1x1.weight", "n1x1.bias"], False
    ),
    "reversed": (
        nn.Sequential(*(nn.LayerNorm(4) for _ in range(12))),
        [f"block{index}.{word}" for index in reversed(range(12)) for word in ("weight", "bias")],
        True,
    ),
    "reversed, of many shapes": (
        nn.Sequential(*(nn.LayerNorm(4 + index) for index in range(3))),
        [f"up{index}.{word}" for index in reversed(range(3)) for word in ("weight", "bias")],
        False,  # each is the only one of its shape but for the bias
    ),
}  # fmt: skip


@pytest.mark.parametrize(("module", "keys", "wrong"), MISLED.values(), ids=MISLED)
def test_what_layers_and_numbers_say_is_not_contradicted(module: nn.Module, keys: list[str], wrong: bool) -> None:
    expected = {name: tensor for name, tensor in tensors_of(module).items() if tensor.dim()}
    state = dict(zip(keys, expected.values(), strict=True))
    assert (contradiction(expected, state, pair_tensors(module, state, "order").keys) is not None) == wrong


@pytest.mark.parametrize(("name", "other"), [("mobilenet_v2", "mobilenetv2_100"), ("densenet121", "densenet121")])
def test_names_of_another_project_contradict_nothing(name: str, other: str) -> None:
    module = torchvision.models.get_model(name)
    state = timm.create_model(other).state_dict()
    pairs = pair_tensors(module, state, "order").keys
    assert sum(state[key].shape == module.state_dict()[name].shape for name, key in pairs.items()) > 200
    assert contradiction(tensors_of(module), state, pairs) is None


def test_statistics_are_not_taken_for_weights_of_their_shape() -> None:
    state = nn.BatchNorm1d(4).state_dict()
    moved = {f"bn.{name}": state[name] for name in ("running_mean", "running_var", "weight", "bias")}
    with pytest.raises(CheckpointError, match=r"by order: bn.running_mean would become 0.weight"):
        load_weights(nn.Sequential(nn.BatchNorm1d(4)), moved, match="order")


def test_error_about_order_advises_names_where_these_fit() -> None:
    state = {f"x.{name}": tensor for name, tensor in Heads("k", "q").state_dict().items()}
    with pytest.raises(CheckpointError, match="Try: `match` name, by which all 4 tensors fit"):
        load_weights(Heads("q", "k"), state, match="order")
    with pytest.raises(CheckpointError) as caught:
        load_weights(Heads("q", "k"), state | {"more": torch.ones(1)}, match="order")
    assert "Try" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "state", "proved"),
    [
        (layers(3, "q", "k"), layers(3, "q", "k", key="h").state_dict(), True),
        (nn.ModuleDict({"net": Heads("q", "k")}), Heads("q", "k").state_dict(), True),  # a prefix of the module's
        (nn.Linear(3, 2), {"a": torch.ones(2, 3), "b": torch.ones(2)}, True),  # each is the only one of its shape
        (nn.Linear(3, 2), {"a": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(2, 3)}, False),  # of two, which?
        (layers(3, "q", "k"), layers(3, "q", "k", key="h", start=1).state_dict(), False),
        (Heads("conv1", "conv2"), Heads("conv0", "conv1").state_dict(), False),
        (Heads("q", "k"), Heads("query", "key").state_dict(), False),
        (Heads("q", "k"), opaque(Heads("q", "k").state_dict()), False),
        (nn.ModuleDict({"a": Heads("q", "k")}), nn.ModuleDict({"b": Heads("k", "q")}).state_dict(), False),
    ],
)
def test_order_is_advised_only_where_names_and_shapes_prove_it(module: nn.Module, state: State, proved: bool) -> None:
    assert certain(tensors_of(module), state, pair_tensors(module, state, "order").keys) is proved
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, state)
    assert ("`match` order" in str(caught.value)) is proved
    if proved:
        assert load_weights(module, state, match="order").complete


def test_names_that_agree_contradict_nothing() -> None:
    module = resnet()
    state = module.state_dict()
    assert contradiction(tensors_of(module), state, pair_tensors(module, state, "order").keys) is None


@pytest.mark.parametrize("prefix", [".", "..", "...a."])
def test_a_prefix_of_dots_is_taken_off_or_left(prefix: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    pairing = pair_tensors(module, state, "name")
    assert set(pairing.keys) >= set(module.state_dict()) or set(pairing.keys) == set(state)


@pytest.mark.parametrize("key", ["b{}.weight", "h.{}.wweight", "block{}"])
def test_keys_that_are_sorted_as_text_are_in_no_order(key: str) -> None:
    module = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(12)))
    expected = module.state_dict()
    tensors = {key.format(index + 1): torch.zeros(4, 4) for index in range(12)}
    for state, wrong in ((dict(sorted(tensors.items())), True), (tensors, False)):
        pairs = pair_tensors(module, state, "order").keys
        assert (contradiction(expected, state, pairs) is not None) == wrong
