"""The rules of access: who may call what, and how large a request may be."""

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
    """The largest request that the server takes.

    request_bytes: size of a body, before and after decompression. image_pixels: size of an image to classify. body_s: seconds in
    which the whole body must arrive.
    """

    request_bytes: int = 64 << 20
    image_pixels: int = option(50_000_000, "The most pixels of an image.", flag="--max-pixels", metavar="N")
    body_s: float = option(30.0, "Time for a request to come whole.", flag="--body-timeout", metavar="S")

    def __post_init__(self) -> None:
        for name in ("request_bytes", "image_pixels", "body_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"`{name}` must be more than 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call.

    loopback: the server listens on this machine alone. token: what every call but health needs. admin_token: what load, unload and
    the list of models need; without one, these calls are allowed only if `loopback` is true and there is no token either.
    replica: whether it is one of several servers behind an address: they refuse to load and unload, and the list is for all who may call.
    """

    loopback: bool = True
    token: str | None = None
    admin_token: str | None = None
    replica: bool = False

    def check(self, headers: Mapping[str, str], *, admin: bool) -> None:
        """Raise RefusedError unless a request with these headers (names in lower case) is allowed."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if admin and not self.replica:
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
            # A web page in a browser on this machine can send requests here, under a name that resolves to it. It cannot hide these headers.
            if not is_loopback(host_of(headers.get("host", "localhost"))):
                raise RefusedError(403, "the server is open to this machine alone: Host must be localhost")
            if "origin" in headers:
                raise RefusedError(403, "requests of web pages are refused: the server has no token")


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def host_of(header: str) -> str:
    """The host of a `Host` header: `::1` for `[::1]:8000`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a name or an address can be reached from this machine only."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """Read a token from a file. Raises UsageError if the file is missing, the token is short, or everybody can read it."""
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
