"""Which GPU an engine is built on."""

import torch

from deploy.errors import BackendError


def current_gpu() -> tuple[str, str]:
    """Name and compute capability (`"9.0"`) of the current CUDA device. Raises BackendError where there is none."""
    if not torch.cuda.is_available():
        raise BackendError("no usable CUDA device: check the driver with nvidia-smi")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"
