"""A file of tactic timings, which concurrent builds may share."""

import fcntl
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.errors import OutputError, UsageError

if TYPE_CHECKING:
    import tensorrt


def use_timing_cache(config: "tensorrt.IBuilderConfig", path: Path) -> "tensorrt.ITimingCache":
    """Give `config` the timings in the file, if there is a file yet.

    The cache that is returned must live as long as the build. Raises UsageError for a file without timings of this version of
    TensorRT on this GPU.
    """
    cache = _load(config, path)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UsageError(
            f"`timing_cache` {path} holds no timings of this version of TensorRT on this GPU: name another file, or remove it"
        )
    return cache


def save_timing_cache(config: "tensorrt.IBuilderConfig", path: Path) -> None:
    """Add the timings of a finished build to those in the file, including those that other builds wrote meanwhile.

    The file is complete at all times. Raises OutputError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            made = config.get_timing_cache()
            others = _load(config, path)
            if others is not None:
                made.combine(others, ignore_mismatch=False)  # existing entries stay
            draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                draft.write_bytes(bytes(made.serialize()))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"`timing_cache` {path} cannot be written: {error.strerror}") from error


def _load(config: "tensorrt.IBuilderConfig", path: Path) -> "tensorrt.ITimingCache | None":
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UsageError(f"`timing_cache` {path} cannot be read: {error.strerror}") from error
    return config.create_timing_cache(content)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock for one process at a time: on a separate file, which stays, because the cache file is replaced."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
