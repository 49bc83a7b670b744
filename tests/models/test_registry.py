import pytest
import torch

from deploy.models import ARCHITECTURES, ModelError, create
from deploy.models.registry import get

CLASSIFIERS = [name for name in ARCHITECTURES if name not in ("mobilenet_v1_features", "rangeseg")]


def example(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    """Small inputs: nets with adaptive pooling take any size."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape[:2], 64, 64) if shape[1] == 3 else shape for shape in ARCHITECTURES[name].inputs.values()]
    return tuple(torch.randn(batch, *shape[1:], generator=generator) for shape in shapes)


def test_registry_holds_the_reference_architectures_under_their_own_names() -> None:
    assert list(ARCHITECTURES) == [
        "mlp", "convnet", "lenet5", "resnet18", "resnet34", "resnet50", "mobilenet_v1", "mobilenet_v1_features", "rangeseg",
    ]  # fmt: skip
    assert all(name == entry.name for name, entry in ARCHITECTURES.items())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_returns_one_logit_a_class_for_every_image(name: str) -> None:
    module = create(name, num_classes=7).eval()
    with torch.no_grad():
        logits = module(*example(name, 3))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    # Neither probabilities nor faded out: the weights are such that parity says something.
    assert not torch.allclose(logits.sum(1), torch.ones(3))
    assert 1e-3 < logits.std() < 1e3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_declared_inputs_run_and_outputs_are_as_many_as_declared(name: str) -> None:
    entry = ARCHITECTURES[name]
    with torch.no_grad():
        result = entry.create().eval()(*(torch.zeros(shape) for shape in entry.inputs.values()))
    assert len(result if isinstance(result, tuple) else [result]) == len(entry.outputs)


@pytest.mark.parametrize("name", ["mlp", "convnet", "lenet5", "resnet18", "mobilenet_v1_features", "rangeseg"])
def test_module_exports_with_a_dynamic_batch(name: str) -> None:
    module = create(name).eval()
    args = example(name, 2)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, args, dynamic_shapes=tuple({0: batch} for _ in args))
    more = example(name, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*more), module(*more))


def test_unknown_architecture_is_refused_with_near_names() -> None:
    with pytest.raises(ModelError, match=r"unknown architecture 'resnet19'; did you mean .*'resnet18'"):
        create("resnet19")
    with pytest.raises(ModelError, match="expected one of mlp, convnet"):
        get("zzz")


def test_unknown_argument_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(
        ModelError, match=r"no argument 'num_class'; did you mean 'num_classes'\?; it takes num_classes=1000, width=1.0"
    ):
        create("mobilenet_v1", num_class=3)


@pytest.mark.parametrize("count", [0, -1, 2.5, "ten", True])
def test_number_of_classes_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(ModelError, match="num_classes of lenet5 must be a whole number, 1 or more"):
        create("lenet5", num_classes=count)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_take_a_number_of_classes(name: str) -> None:
    net = create(name, num_classes=7).eval()
    results = net(*(torch.zeros(2, *shape[1:]) for shape in ARCHITECTURES[name].inputs.values()))
    if name == "mobilenet_v1_features":  # has no head
        assert [result.shape[1] for result in results] == [32, 64, 128, 128, 256, 256, 512]
    else:
        assert results.shape[1] == 7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_docstrings_give_shapes_and_paper(name: str) -> None:
    entry = ARCHITECTURES[name]
    doc = type(entry.create()).__doc__ or ""
    assert "In: " in doc
    assert "Out: " in doc
    assert entry.paper
