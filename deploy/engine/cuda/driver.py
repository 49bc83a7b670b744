"""The version of the NVIDIA driver."""

from pathlib import Path

_FILE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """Such as `"580.95.05"`; None where the kernel does not say."""
    try:
        words = _FILE.read_text(encoding="ascii", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025
    return next((word for word in words if word[0].isdecimal() and "." in word), None)


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and offers a device (Linux), asked without loading CUDA."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()  # /dev/dxg: WSL
