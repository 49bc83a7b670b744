"""What is kept between runs, because it can be found again: in $XDG_CACHE_HOME/deploy, or in ~/.cache/deploy."""

import logging
import os
import secrets
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploy"


def keep(path: Path, content: bytes, what: str) -> None:
    """Write a file of the cache, whole or not at all. Where that cannot be done, a warning says that `what` is not kept."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        if draft.exists():
            draft.unlink()
        logger.warning("%s cannot be kept in %s: %s", what, path, error)
