"""The cache: files in $XDG_CACHE_HOME/deploy, or in ~/.cache/deploy, that can be deleted and made again."""

import logging
import os
import secrets
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

ENGINES = "engines"
"""The folder of the cache that holds engines, directories and single files."""

LIMIT_BYTES = 4 << 30
"""The limit of a folder of large files."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploy"


def keep(path: Path, content: bytes, what: str) -> None:
    """Write a file of the cache, completely or not at all. If it fails, log a warning that `what` is not kept."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        if draft.exists():
            draft.unlink()
        logger.warning("%s cannot be kept in %s: %s", what, path, error)


def trim(folder: Path, limit: int = LIMIT_BYTES) -> None:
    """Remove the oldest entries of `folder` until the rest has at most `limit` bytes; the newest entry always stays."""
    times, sizes = {}, {}
    for entry in folder.iterdir():
        try:
            files = [entry] if entry.is_file() else list(entry.iterdir())
            sizes[entry] = sum(file.stat().st_size for file in files)
            times[entry] = entry.stat().st_mtime
        except FileNotFoundError:
            continue  # another process removed it
    for entry in sorted(times, key=times.__getitem__)[:-1]:
        if sum(sizes.values()) <= limit:
            break
        del sizes[entry]
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
