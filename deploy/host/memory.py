"""Gives memory back to the system that the process no longer uses."""

import ctypes
import gc

_WORTH_IT = 100_000_000
"""Bytes of a model below which its memory is left to Python's own collector."""


def release(size: int) -> None:
    """Free what models of about `size` bytes left behind, before the next one is opened.

    The graphs of `onnx_ir` hang together in cycles, which Python collects by the number of objects and not by their size.
    """
    if size < _WORTH_IT:
        return
    gc.collect()
    trim()


def trim() -> None:
    """Give back the blocks that are free: the C library keeps them for itself, hundreds of megabytes after large arrays."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if malloc_trim is not None:
        malloc_trim(0)
