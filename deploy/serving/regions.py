"""System shared memory: regions that clients of this machine register, for inputs and outputs that need not be sent.

The extension: Triton Inference Server, "Shared-Memory Extension". A region is a part of a POSIX shared memory object. It is read and
written by file operations and not mapped: a client that makes its object smaller would end a server that has it mapped.
"""

import contextlib
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError, RefusedError
from deploy.serving.request import Place, bytes_of, check_size, from_bytes

_FOLDER = Path("/dev/shm")  # noqa: S108  (where Linux has POSIX shared memory)
_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,256}")
_KEY = re.compile(r"/?([A-Za-z0-9_+-][A-Za-z0-9._+-]{0,254})")
_MOST_REGIONS = 1024


@dataclass(frozen=True, kw_only=True)
class Region:
    """Bytes `offset` to `offset + byte_size` of the shared memory object `key`, which is open as `file`."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


class Regions:
    """The registered regions. Safe to use from many threads.

    on: whether the server takes shared memory at all. most_bytes: of one input; an object may be larger than the memory.
    """

    def __init__(self, *, on: bool = False, most_bytes: int = 64 << 20) -> None:
        self.on = on
        self._most_bytes = most_bytes
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: Any, key: Any, offset: Any, byte_size: Any) -> None:
        """Raises InputError for what cannot be a region, and RefusedError."""
        self._check_on()
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot be the name of a region: at most 256 characters, without a slash")
        matched = _KEY.fullmatch(key) if isinstance(key, str) else None
        if matched is None:
            raise InputError(f"{key!r} is not the key of a shared memory object: letters, digits and ._+- behind one slash")
        for what, value in (("offset", offset), ("byte_size", byte_size)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
                raise InputError(f"{what} of region {name!r} must be a number of bytes, not {value!r}")
        if not byte_size:
            raise InputError(f"byte_size of region {name!r} is 0")
        try:
            file = os.open(_FOLDER / matched[1], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"cannot open the shared memory object {key!r}: {error.strerror}") from error
        region = Region(name=name, key=key, offset=offset, byte_size=byte_size, file=file)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{key!r} is no shared memory object")
            if offset + byte_size > status.st_size:
                raise InputError(
                    f"region {name!r} would end at byte {offset + byte_size}, and the shared memory object {key!r} at {status.st_size}"
                )
            with self._lock:
                if name in self._regions:
                    raise RefusedError(409, f"region {name!r} is registered already")
                if len(self._regions) >= _MOST_REGIONS:
                    raise RefusedError(503, f"{_MOST_REGIONS} regions are registered, which is all that is taken")
                self._regions[name] = region
        except BaseException:
            os.close(file)
            raise

    def status(self, name: str = "") -> list[Region]:
        """The region of this name, or all. Raises RefusedError."""
        self._check_on()
        with self._lock:
            if name and name not in self._regions:
                raise RefusedError(404, f"no region {name!r} is registered")
            return [self._regions[name]] if name else list(self._regions.values())

    def unregister(self, name: str = "") -> None:
        """Forget the region of this name, if there is one, or all. Raises RefusedError."""
        self._check_on()
        with self._lock:
            for each in [name] if name else list(self._regions):
                if (region := self._regions.pop(each, None)) is not None:
                    os.close(region.file)

    def close(self) -> None:
        with contextlib.suppress(RefusedError):
            self.unregister()

    def read(self, place: Place, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
        """A copy of a tensor, which lies there little-endian. Raises InputError and RefusedError."""
        self._check_on()
        check_size(place.size, spec, shape)
        if place.size > self._most_bytes:
            raise RefusedError(
                413, f"{spec.name!r} has {place.size} bytes; {self._most_bytes} are the most that is taken of one input"
            )
        with self._lock:  # so that the file is not closed, and its number given to another
            region = self._find(place)
            data = np.empty(place.size, dtype=np.uint8)
            got = os.preadv(region.file, [data.data], region.offset + place.offset)
        if got != place.size:
            raise _shrunk(region)
        return from_bytes(data.data, spec, shape)

    def write(self, place: Place, array: np.ndarray) -> None:
        """Write an array. Raises InputError if its size is not that of the place, and RefusedError."""
        if array.nbytes > place.size:
            raise InputError(f"the output has {array.nbytes} bytes, and {place.size} were set aside in region {place.region!r}")
        data = bytes_of(array)
        with self._lock:
            region = self._find(place)
            start = region.offset + place.offset
            if start + len(data) > os.fstat(region.file).st_size or os.pwrite(region.file, data, start) != len(data):
                raise _shrunk(region)

    def check(self, place: Place) -> None:
        """Raise InputError or RefusedError for a place that is not inside a registered region."""
        with self._lock:
            self._find(place)

    def _find(self, place: Place) -> Region:
        self._check_on()
        region = self._regions.get(place.region)
        if region is None:
            raise InputError(f"no region {place.region!r} of shared memory is registered")
        if place.offset + place.size > region.byte_size:
            raise InputError(
                f"bytes {place.offset} to {place.offset + place.size} are not inside region {place.region!r}, which has {region.byte_size}"
            )
        return region

    def _check_on(self) -> None:
        if not self.on:
            raise RefusedError(403, "shared memory is off: start the server with --shared-memory")


NO_REGIONS = Regions()
"""Of a server without shared memory."""


def refuse_cuda() -> RefusedError:
    """The error for CUDA shared memory."""
    return RefusedError(501, "CUDA shared memory is not taken here: register system shared memory, or send the tensors")


def _shrunk(region: Region) -> InputError:
    return InputError(f"the shared memory object {region.key!r} has become smaller than region {region.name!r}")
