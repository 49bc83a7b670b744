"""The library of TensorRT that ONNX Runtime's TensorRT provider was linked with: it takes no other major version."""

import contextlib
import ctypes
import importlib
import re
from pathlib import Path

from deploy.host.versions import version_of

_NAME = re.compile(rb"libnvinfer\.so\.(\d+)\0")


def nvinfer_missing(provider: Path) -> str | None:
    """Why the libnvinfer that the shared library `provider` names cannot be loaded; None if it can, or no file names one."""
    if not provider.is_file() or not (found := _NAME.search(provider.read_bytes())):
        return None
    with contextlib.suppress(ImportError):  # loads its own, where the dynamic linker would not find it
        importlib.import_module("tensorrt")
    name, major = f"libnvinfer.so.{found[1].decode()}", int(found[1])
    try:
        ctypes.CDLL(name)
    except OSError:
        installed = version_of("tensorrt")
        beside = f"TensorRT {installed} is installed" if installed else "no TensorRT is installed"
        return f"needs {name}, of TensorRT {major}, and {beside}: pip install 'tensorrt>={major},<{major + 1}'"
    return None
