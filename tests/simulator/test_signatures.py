"""What stands for a library has the names and arguments of the real one. pycuda cannot be imported without a driver to compare with."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import tensorrt_rtx
import torch
from cuda.bindings import runtime

from tests.simulator import refitters, tensorrt_front, torch_streams
from tests.simulator.contexts import ExecutionContext
from tests.simulator.runtime_front import RuntimeFront
from tests.simulator.simulated import Simulated

FUNCTIONS = sorted(name for name in vars(RuntimeFront) if name.startswith("cuda"))

CLASSES = [
    (tensorrt_front.Runtime, tensorrt_rtx.Runtime),
    (tensorrt_front.Engine, tensorrt_rtx.ICudaEngine),
    (ExecutionContext, tensorrt_rtx.IExecutionContext),
    (tensorrt_front.Inspector, tensorrt_rtx.EngineInspector),
    (tensorrt_front.RuntimeConfig, tensorrt_rtx.IRuntimeConfig),
    (tensorrt_front.RuntimeCache, tensorrt_rtx.IRuntimeCache),
    (refitters.Refitter, tensorrt_rtx.Refitter),
    (refitters.OnnxParserRefitter, tensorrt_rtx.OnnxParserRefitter),
    (torch_streams.Stream, torch.cuda.Stream),
    (torch_streams.Event, torch.cuda.Event),
    (torch_streams.CUDAGraph, torch.cuda.CUDAGraph),
]

OWN = {"Engine": {"log", "allocate", "free", "note_graph"}, "RuntimeConfig": {"check_cache"}}
"""What is the simulator's own, and not of the library."""


def documented(line: str) -> list[str]:
    """The names of the arguments in the first line of a docstring: `f(self: T, size_t count, kind: K = 0) -> None`."""
    inside = line[line.index("(") + 1 : line.rindex(")")] if ")" in line else ""
    inside = re.sub(r"<[^>]*>|\[[^\]]*\]", "", inside)
    return [part.split("=")[0].split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]


def overloads(function: Any) -> Iterator[list[str]]:
    """The arguments of each overload of a function of pybind's, without `self`."""
    for line in (function.__doc__ or "").splitlines():
        if re.match(rf"(\d+\. )?{function.__name__}\(", line) and "*args" not in line:
            yield [name for name in documented(line.split(") ->")[0] + ")") if name != "self"]


def arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_cuda_python_take_what_the_real_ones_take(name: str) -> None:
    real = getattr(runtime, name)
    assert arguments(getattr(RuntimeFront, name)) == documented(real.__doc__.splitlines()[0])


@pytest.mark.parametrize(("simulated", "real"), CLASSES, ids=lambda c: c.__name__)
def test_classes_have_no_other_methods_and_arguments_than_the_real_ones(simulated: type, real: type) -> None:
    compared = 0
    for name, member in vars(simulated).items():
        if name.startswith("_") or name in OWN.get(simulated.__name__, ()):
            continue
        if name in ("machine", "device", "plan", "inner"):
            continue
        assert hasattr(real, name), f"{real.__name__} has no {name}"
        if not inspect.isfunction(member):
            continue
        theirs = getattr(real, name)
        found = list(overloads(theirs))
        if inspect.isfunction(theirs):
            found = [arguments(theirs)]
        if found:
            compared += 1
            ours = arguments(member)
            assert any(ours == args or set(args) <= set(ours) for args in found), f"{name}{ours} instead of {found}"
    assert compared or simulated in (tensorrt_front.Inspector,)


def test_the_comparison_finds_another_name_and_another_number() -> None:
    assert documented("cudaMemcpyAsync(dst, src, size_t count, kind: cudaMemcpyKind, stream)") == [
        "dst",
        "src",
        "count",
        "kind",
        "stream",
    ]
    (found,) = overloads(tensorrt_rtx.IExecutionContext.set_tensor_address)
    assert found == ["name", "memory"]


def test_what_the_module_lacks_the_simulator_lacks(simulated: Simulated) -> None:
    for call in (
        lambda: simulated.runtime.cudaNoSuchThing,
        lambda: simulated.runtime.cudaMemcpy3D,
        lambda: simulated.trt.NoSuchThing,
    ):
        with pytest.raises(AttributeError):
            call()
    with pytest.raises(AttributeError):
        _ = simulated.trt.CudaGraphStrategy  # of TensorRT-RTX alone
    with pytest.raises(TypeError):
        simulated.runtime.cudaMemGetInfo(0)
    with pytest.raises(TypeError):
        simulated.trt.Runtime(object())
