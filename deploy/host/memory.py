"""Gives memory back to the system that the process no longer uses."""

import ctypes
import gc

_WORTH_IT = 100_000_000
"""Bytes of a model below which its memory is left to Python's own collector."""


def release(size: int) -> None:
    """Free what models of about `size` bytes left behind, before the next one is opened.

    The graphs of `onnx_ir` hang together in cycles, which Python collects by the number of objects and not by their size; and the
    C library keeps freed blocks for itself, hundreds of megabytes after a runtime has opened a large model.
    """
    if size < _WORTH_IT:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
