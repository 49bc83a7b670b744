"""torch's permission to compute FP32 in TF32."""

import threading

import torch

from deploy.errors import BackendError
from deploy.runtime.session import first_line


class Tf32:
    """The permission, which is one setting for the whole process. All open sessions share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._allow = False
        self._before = (False, False)

    def hold(self, *, allow: bool) -> None:
        """Set the permission until `release`. Raises BackendError if an open session needs the opposite."""
        with self._lock:
            if self._holders and allow != self._allow:
                words = ("with", "without") if self._allow else ("without", "with")
                raise BackendError(
                    f"another session of this process runs {words[0]} TF32, which is one setting for all:"
                    f" close it before one is opened {words[1]} TF32"
                )
            if not self._holders:
                try:
                    self._before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
                except RuntimeError as error:  # the program has set fp32_precision
                    raise BackendError(
                        f"torch cannot say whether TF32 is on: {first_line(error)}; set torch.backends.cuda.matmul.allow_tf32"
                        " and torch.backends.cudnn.allow_tf32 in place of fp32_precision"
                    ) from error
                self._set(allow, allow)
            self._allow = allow
            self._holders += 1

    def release(self) -> None:
        """Undo one `hold`; the last one restores the setting from before the first."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._set(*self._before)

    def _set(self, matmul: bool, cudnn: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


tf32 = Tf32()
"""The permission of this process."""
