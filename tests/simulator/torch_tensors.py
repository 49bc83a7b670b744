"""Tensors that say that they are on a GPU: wrappers around tensors on simulated memory, whose work is put on streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils._pytree import tree_flatten, tree_map

from tests.simulator.memory import Allocation
from tests.simulator.work import Action, Use

if TYPE_CHECKING:
    from tests.simulator.torch_front import TorchFront


class CudaTensor(torch.Tensor):
    """`inside`: a tensor on the CPU with the same memory; `keeper`: what keeps that allocated."""

    __module__ = "torch"  # where a tensor's class is looked for

    front: ClassVar[TorchFront]
    inside: torch.Tensor
    keeper: Any

    @staticmethod
    def __new__(cls, inside: torch.Tensor, keeper: Any, index: int) -> CudaTensor:
        torch._C._ensureCUDADeviceGuardSet()
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), dtype=inside.dtype, device=torch.device("cuda", index)
        )
        made.inside, made.keeper = inside, keeper
        return made

    def data_ptr(self) -> int:
        return self.inside.data_ptr() if self.inside.numel() else 0

    def record_stream(self, stream: Any) -> None:
        self.front.record_stream(self, stream)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"<simulated {self.dtype} {tuple(self.shape)} on {self.device}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            return _copy(
                cls.front, args[0], args[1], non_blocking=kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            )
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
            return _to_host(cls.front, args[0], kwargs.get("dtype"))
        if func.is_view:
            source = args[0]
            return CudaTensor(func(*tree_map(_inside, args), **kwargs), source.keeper, source.device.index)
        return _kernel(cls.front, func, args, kwargs)


def _inside(x: Any) -> Any:
    return x.inside if isinstance(x, CudaTensor) else x


def use(x: torch.Tensor, *, write: bool) -> Use:
    """The bytes from the first to the last element of a tensor on simulated memory."""
    if not x.numel():
        return Use(x.data_ptr(), 0, write)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Use(x.data_ptr(), (last + 1) * x.element_size(), write)


def _uses(*pairs: tuple[torch.Tensor, bool]) -> tuple[Use, ...]:
    return tuple(use(x, write=write) for x, write in pairs if x.numel())


def _kernel(front: TorchFront, func: Any, args: Any, kwargs: Any) -> Any:
    """Any operator: a kernel on the current stream. One whose result is no tensor waits for it."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    for x in tensors:
        if not isinstance(x, CudaTensor) and x.dim():
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")
    index = next(x for x in tensors if isinstance(x, CudaTensor)).device.index
    inner_args, inner_kwargs = tree_map(_inside, args), {**tree_map(_inside, kwargs)}
    if "device" in inner_kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    reads = [(x.inside, False) for x in tensors if isinstance(x, CudaTensor)]
    written = [args[i] for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write and i < len(args)]
    if written:
        writes = [(x.inside, True) for x in written]
        front.put(Action(str(func), _uses(*reads, *writes), lambda: func(*inner_args, **inner_kwargs), kernel=True), index)
        return written[0]
    if not any(isinstance(r.type, torch.TensorType) for r in func._schema.returns):
        front.put(Action(str(func), _uses(*reads), kernel=True), index)
        front.synchronize_current(index)
        return func(*inner_args, **inner_kwargs)
    shown = func(
        *tree_map(_zeros, args), **{**tree_map(_zeros, kwargs), **{k: v for k, v in inner_kwargs.items() if k == "device"}}
    )
    shapes, _ = tree_flatten(shown)
    results = [front.empty_strided(x.shape, x.stride(), x.dtype, index) for x in shapes]

    def run() -> None:
        try:
            found, _ = tree_flatten(func(*inner_args, **inner_kwargs))
        except IndexError:  # an assertion on the device: CUDA answers with it from then on
            front.machine.sticky = "cudaErrorAssert"
            return
        for result, value in zip(results, found, strict=True):
            result.inside.copy_(value)

    front.put(Action(str(func), _uses(*reads, *((r.inside, True) for r in results)), run, kernel=True), index)
    return results[0] if isinstance(shown, torch.Tensor) else tuple(results)


def _zeros(x: Any) -> Any:
    """A tensor to learn from what the shape of a result is: what is in the real one is not known yet."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).zero_() if isinstance(x, torch.Tensor) else x


def _copy(front: TorchFront, to: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    """`Tensor.copy_` between host and device: with pinned memory and `non_blocking` it returns before the copy is done."""
    target, origin = _inside(to), _inside(source)
    index = (to if isinstance(to, CudaTensor) else source).device.index
    if isinstance(to, CudaTensor) and isinstance(source, CudaTensor):
        front.put(Action("copy on the device", _uses((origin, False), (target, True)), lambda: target.copy_(origin)), index)
        return to
    pinned = front.pinned_owner(origin if isinstance(to, CudaTensor) else target)
    if isinstance(to, CudaTensor):
        if pinned is None:
            origin = origin.clone()  # the driver copies pageable memory before it returns
        uses = _uses((target, True)) if pinned is None else _uses((origin, False), (target, True))
        front.put(Action("copy to the device", uses, lambda: target.copy_(origin)), index)
    else:
        uses = _uses((origin, False)) if pinned is None else _uses((origin, False), (target, True))
        front.put(Action("copy to the host", uses, lambda: target.copy_(origin)), index)
        non_blocking = non_blocking and pinned is not None
    if not non_blocking:
        front.synchronize_current(index)
    return to


def _to_host(front: TorchFront, x: CudaTensor, dtype: torch.dtype | None) -> torch.Tensor:
    found = torch.empty(x.shape, dtype=x.dtype)
    _copy(front, found, x, non_blocking=False)
    return found if dtype is None else found.to(dtype)


class Keeper:
    """Calls `gone` once no tensor and no array has this any longer, before the next call of CUDA's."""

    def __init__(self, queue: Any, gone: Callable[[], None], owner: Allocation | None = None) -> None:
        self._queue, self._gone = queue, gone
        if owner is not None:  # np.asarray of this is the memory, and keeps this
            self.__array_interface__ = {
                "data": (owner.address, False), "shape": (max(owner.nbytes, 1),), "typestr": "|u1", "version": 3,
            }  # fmt: skip

    def __del__(self) -> None:
        self._queue.append(self._gone)
