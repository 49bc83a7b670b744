"""torch on this machine: the devices that it can use. It loads nothing of what builds modules."""

from collections.abc import Sequence

import torch

from deploy.engine.cuda.capturing import capturing
from deploy.errors import BackendError


def device_named(device: str) -> str:
    """torch's device for `SessionOptions.device`: `cpu` or `cuda:N`. `auto` is the GPU where there is one.

    It has its index, because each thread has a current device of its own. Raises BackendError for a GPU that is not there.
    """
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise BackendError(f"no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} usable CUDA devices")
    return f"cuda:{index}"


def wait_for_device(device: torch.device) -> None:
    """Wait for all that a GPU has been given. It waits for captures of CUDA graphs too, which it would end, in any thread."""
    with capturing:
        torch.cuda.synchronize(device)


def version(variant: Sequence[str]) -> str:
    """The version of torch."""
    return str(torch.__version__)
