"""Reading the body of a request over REST: within limits, and decompressed."""

import zlib

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from deploy.errors import RefusedError


async def read_body(receive: Receive, declared: str | None, encoding: str, limit: int) -> bytes:
    """Read and decompress the body of a request.

    declared, encoding: its headers Content-Length and Content-Encoding. Raises RefusedError as soon as the body has more than `limit`
    bytes, and ClientDisconnect.
    """
    if declared is not None and declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    expand = _Expander(encoding, limit)
    parts: list[bytes] = []
    taken = size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        taken += len(chunk)
        part = expand(chunk)
        size += len(part)
        if taken > limit or size > limit:
            raise _too_large(limit)
        parts.append(part)
    expand.end()
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Expander:
    """Decompresses a stream piece by piece. A piece never gives more than one byte beyond the limit."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._limit = limit
        encoding = encoding.strip().lower()
        if encoding in ("", "identity"):
            self._zlib = None
        elif encoding in ("gzip", "x-gzip"):
            self._zlib = zlib.decompressobj(31)
        elif encoding == "deflate":
            self._zlib = zlib.decompressobj()
        else:
            raise RefusedError(415, f"Content-Encoding {encoding!r} is not known; expected gzip or deflate")
        self._begun = False

    def __call__(self, chunk: bytes) -> bytes:
        if self._zlib is None:
            return chunk
        self._begun = self._begun or bool(chunk)
        try:
            part = self._zlib.decompress(chunk, self._limit + 1)
        except zlib.error as error:
            raise RefusedError(400, f"the body cannot be decompressed: {error}") from None
        if self._zlib.unused_data:
            raise RefusedError(400, "there is more behind the end of the compressed body")
        return part

    def end(self) -> None:
        if self._zlib is not None and self._begun and not self._zlib.eof:
            raise RefusedError(400, "the compressed body is cut off")


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the request is larger than {limit} bytes, which is all that is taken")
