"""The NVIDIA driver: its version, and whether it offers a GPU."""

from pathlib import Path

_FILE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """The version of the driver, such as `"580.95.05"`; None if the kernel does not report one."""
    try:
        words = _FILE.read_text(encoding="ascii", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025
    return next((word for word in words if word[0].isdecimal() and "." in word), None)


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and offers a device (Linux), without loading CUDA."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()  # /dev/dxg: WSL
