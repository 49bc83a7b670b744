"""What stands between a client and the models: who may call what, and how much of a request is read."""

import functools
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import RefusedError, UsageError
from deploy.options import option


@dataclass(frozen=True, kw_only=True)
class Limits:
    """request_bytes: of a body, before and after decompression. image_pixels: of an image to classify. body_s: in which a body must
    have come whole."""

    request_bytes: int = 64 << 20
    image_pixels: int = option(50_000_000, "The most pixels of an image.", flag="--max-pixels", metavar="N")
    body_s: float = option(30.0, "Time for a request to come whole.", flag="--body-timeout", metavar="S")

    def __post_init__(self) -> None:
        for name in ("request_bytes", "image_pixels", "body_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"`{name}` must be more than 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call. token: for everything but health. admin_token: for load, unload and the list of models.

    Without an admin token, admin calls are let through where the server is open to this machine alone and has no token either.
    """

    loopback: bool = True
    token: str | None = None
    admin_token: str | None = None

    def check(self, headers: Mapping[str, str], *, admin: bool) -> None:
        """Raise RefusedError unless a request with these headers (names in lower case) may go on."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if admin:
            if self.admin_token is not None:
                if not _same(given, self.admin_token):
                    raise RefusedError(401, "admin calls need the admin token: Authorization: Bearer TOKEN")
                return
            if not self.loopback or self.token is not None:
                raise RefusedError(403, "admin calls are off: start the server with --admin-token-file")
        if self.token is not None and not (
            _same(given, self.token) or (self.admin_token is not None and _same(given, self.admin_token))
        ):
            raise RefusedError(401, "a token is needed: Authorization: Bearer TOKEN")
        if self.loopback and self.token is None:
            # A page in a browser of this machine can send requests here, by a name that leads to it; it cannot hide these.
            if not is_loopback(host_of(headers.get("host", "localhost"))):
                raise RefusedError(403, "the server is open to this machine alone: Host must be localhost")
            if "origin" in headers:
                raise RefusedError(403, "requests of web pages are refused: the server has no token")


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def host_of(header: str) -> str:
    """`[::1]:8000` -> `::1`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a name or address leads to this machine alone."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """The token in a file. Raises UsageError for one that is missing, short, or open to others."""
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"cannot read the token file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"the token in {path} must be ASCII") from None
    if len(text) < 16 or any(char.isspace() for char in text):
        raise UsageError(f"the token in {path} must be 16 characters or more, without spaces: try `openssl rand -hex 24`")
    if mode & 0o007:
        raise UsageError(f"{path} can be read by everybody: chmod 600 {path}")
    return text
