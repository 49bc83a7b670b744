"""Inputs go to the parameters of a module's forward: by position, by keyword, into lists and dicts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx_ir import to_proto
from onnxruntime import InferenceSession
from torch import Tensor, nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError, UsageError
from deploy.intake.call import ByPosition, bind, bound, by_position
from deploy.intake.exporter import export_graph


def module_of(forward: Callable[..., Any]) -> nn.Module:
    module = nn.Module()
    module.forward = forward  # type: ignore[method-assign]
    return module


FORMS: dict[str, tuple[Callable[..., Any], dict[str, int], tuple[Any, ...], dict[str, Any]]] = {
    "by position": (lambda x, y: 0, {"a": 1, "b": 2}, (1, 2), {}),
    "some of the parameters": (lambda x, y=None, z=None: 0, {"a": 1, "b": 2}, (1, 2), {}),
    "any number": (lambda *xs: 0, {"xs.0": 1, "b": 2}, (1, 2), {}),
    "by keyword alone": (lambda x, *, mask, scale=1: 0, {"mask": 1, "x": 2}, (2,), {"mask": 1}),
    "a list": (lambda xs: 0, {"xs.0": 1, "xs.1": 2}, ([1, 2],), {}),
    "a dict and a tensor": (lambda x, batch: 0, {"batch.b": 1, "image": 2, "batch.a": 3}, (2, {"b": 1, "a": 3}), {}),
    "a dict behind parameters left out": (lambda x=None, y=None, batch=None: 0, {"batch.b": 1}, (), {"batch": {"b": 1}}),
    "a list in a dict": (lambda batch: 0, {"batch.x.0": 1, "batch.x.1": 2, "batch.m": 3}, ({"x": [1, 2], "m": 3},), {}),
    "a dict in a list": (lambda xs: 0, {"xs.0.a": 1, "xs.0.b.c": 2, "xs.1": 3}, ([{"a": 1, "b": {"c": 2}}, 3],), {}),
    "a list by keyword alone": (lambda *, xs: 0, {"xs.0": 1}, (), {"xs": [1]}),
    "a name with a dot": (lambda x: 0, {"image.1": 1}, (1,), {}),
}


@pytest.mark.parametrize(("forward", "values", "args", "kwargs"), FORMS.values(), ids=FORMS)
def test_inputs_are_passed_as_forward_takes_them(
    forward: Callable[..., Any], values: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    module = module_of(forward)
    assert bind(module, values) == (args, kwargs)
    assert by_position(module, ["a", "b"][: len(values)] if kwargs == {} and args == tuple(values.values()) else list(values))


def test_keywords_keep_the_order_of_the_parameters() -> None:
    module = module_of(lambda *, a, b, c: 0)
    assert list(bind(module, {"c": 1, "a": 2, "b": 3})[1]) == ["a", "b", "c"]
    assert bound(module, {"c": 1, "a": 2, "b": 3}) == {"a": 2, "b": 3, "c": 1}


def annotated(xs: list[Tensor]) -> Tensor:
    return xs[0]


def quoted(batch: "dict[str, Tensor]") -> Tensor:
    return batch["x"]


REFUSED: dict[str, tuple[Callable[..., Any], list[str], str]] = {
    "more than it takes": (lambda x: 0, ["a", "b"], r"takes 1 input by position \(x\), and 2 are given: a, b\n.*'x'.*x\.0"),
    "a list that says so": (annotated, ["x"], r"takes a list as 'xs': .*xs\.0"),
    "a dict that says so": (quoted, ["x"], r"takes a dict as 'batch': .*batch\.KEY"),
    "a member missing": (lambda xs: 0, ["xs.0", "xs.2"], r"xs\.0, xs\.2: members of a list are xs\.0, xs\.1"),
    "a list and a dict": (lambda xs: 0, ["xs.0", "xs.a"], r"cannot be given xs\.0, xs\.a"),
    "a list deep inside": (lambda b: 0, ["b.i.1"], r"cannot be given b\.i\.1: members of a list are b\.i\.0"),
    "a tensor with members": (lambda b: 0, ["b.i", "b.i.x"], r"cannot be given b\.i both as a tensor and with members, b\.i\.x"),
    "another name than the keyword": (lambda *, image: 0, ["x"], r"\n'image' is taken by keyword alone"),
    "any keyword": (lambda x, **more: 0, ["x", "more.y"], r"\ntorch\.export does not take what \*\*more holds"),
    "nothing": (lambda: 0, ["x"], r"takes 0 inputs by position, and 1 are given: x\nleave them out"),
}


@pytest.mark.parametrize(("forward", "names", "message"), REFUSED.values(), ids=REFUSED)
def test_what_forward_does_not_take_is_refused_naming_the_parameter(
    forward: Callable[..., Any], names: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=rf"(?s)^Module\.forward .*{message}"):
        bind(module_of(forward), dict.fromkeys(names))


class Mixed(nn.Module):
    """Subtraction of all it takes: one by position, a dict, a list with a dict in it, one by keyword."""

    def forward(self, x: Tensor, batch: dict[str, Tensor], *, xs: list[Any], mask: Tensor) -> Tensor:
        return ((x - batch["b"]) * 2 - batch["a"] - xs[0] * 3 - xs[1] - xs[2]["c"]["d"] * 5) * mask


def test_the_graph_has_the_inputs_in_the_users_order_and_eager_by_position_agrees() -> None:
    names = ["mask", "xs.0", "batch.a", "first", "xs.1", "batch.b", "xs.2.c.d"]
    feed = {name: torch.randn(2, 3) for name in names}
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", 3)) for name in names]
    graph = export_graph(Mixed(), specs, feed, ["y"])
    assert [value.name for value in graph.graph.inputs] == names
    session = InferenceSession(to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    given = {name: torch.randn(5, 3) for name in names}
    (got,) = session.run(None, {name: x.numpy() for name, x in given.items()})
    module = by_position(Mixed(), names)
    assert isinstance(module, ByPosition)
    np.testing.assert_allclose(got, module(*given.values()).numpy(), rtol=1e-5, atol=1e-6)
    plain = nn.Linear(3, 3)
    assert by_position(plain, ["x"]) is plain


def test_a_fixed_dimension_of_a_member_is_named() -> None:
    specs = [TensorSpec(name=f"batch.{key}", dtype="float32", shape=(dim, 4)) for key, dim in (("a", "N"), ("b", "M"))]

    class Two(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["a"] + batch["b"].view(3, 4)

    with pytest.raises(ExportError, match=r"fixes the dimensions? 'N', 'M'|fixes the dimensions? 'M', 'N'"):
        export_graph(Two(), specs, {spec.name: torch.randn(3, 4) for spec in specs}, ["y"])
