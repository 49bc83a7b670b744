"""The bodies of requests and answers over REST: read within limits, decompressed, and compressed where that is asked for."""

import asyncio
import contextlib
import mmap
import zlib
from collections.abc import Coroutine, Generator, Iterator
from types import coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from deploy.errors import RefusedError, UnavailableError
from deploy.serving.numbers import Body

T = TypeVar("T")

SMALLEST_BYTES = 1024
"""A smaller answer is not compressed: it fits into a packet."""

_LEVEL = 1  # answers are numbers, of which higher levels save little and take long
_PIECE_BYTES = 1 << 20
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""The argument `wbits` of zlib for an encoding."""


async def read_body(receive: Receive, declared: str | None, encoding: str, limit: int) -> Body:
    """Read and decompress the body of a request.

    declared, encoding: its headers Content-Length and Content-Encoding. Raises RefusedError as soon as the body has more than `limit`
    bytes, UnavailableError where there is no memory for it, and ClientDisconnect.
    """
    size = int(declared) if declared is not None and declared.isdecimal() and len(declared) < 20 else None
    if size is not None and size > limit:
        raise _too_large(limit)
    expander = _Expander(encoding)
    body = _Growing(limit if size is None or expander.zlib else size)
    taken = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        taken += len(chunk)
        if taken > limit:
            raise _too_large(limit)
        if not (more or body.size or expander.zlib):
            return bytes(chunk)
        for part in expander(chunk):
            if body.size + len(part) > limit:
                raise _too_large(limit)
            body.add(part)
            if expander.zlib is not None:
                await asyncio.sleep(0)  # a small chunk may become a large part
    expander.end()
    return body.whole()


@coroutine
def in_time(work: Coroutine[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    """What a coroutine returns. Raises TimeoutError after `seconds`, by a timer that is set only where it has to wait.

    Most bodies have come with the head, and a timer takes longer than to read one.
    """
    try:
        waited_for = work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    return (yield from _in_time(work, waited_for, seconds).__await__())


async def _in_time(work: Coroutine[Any, Any, T], waited_for: Any, seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await _resumed(work, waited_for)


@coroutine
def _resumed(work: Coroutine[Any, Any, T], waited_for: Any) -> Generator[Any, Any, T]:
    """Go on with a coroutine that has been begun and waits for something."""
    try:
        while True:
            try:
                result = yield waited_for
            except BaseException as error:
                waited_for = work.throw(error)
            else:
                waited_for = work.send(result)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


class _Growing:
    """A body that is put together without ever being copied: that of a large one would stop all other requests for as long.

    most: the most bytes that it will have. A bytearray moves when it grows, so a large body lies in pages of its own, which are there
    once they are written to; large ones where the system has them, which are taken and given back in less time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._small = bytearray()
        self._large: mmap.mmap | None = None
        self.size = 0

    def add(self, part: bytes) -> None:
        size = self.size + len(part)
        if self._large is None and size > _PIECE_BYTES:
            self._large = _pages(max(self._most, size))
            self._large[: self.size] = bytes(self._small)
            self._small.clear()
        if self._large is None:
            self._small += part
        else:
            self._large[self.size : size] = part
        self.size = size

    def whole(self) -> bytearray | mmap.mmap:
        if self._large is None:
            return self._small
        if len(self._large) > self.size:
            self._large.resize(self.size)
        return self._large


def _pages(size: int) -> mmap.mmap:
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise UnavailableError(f"there is no memory for a request of {size} bytes") from error
    with contextlib.suppress(OSError):  # the system has no large ones
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class _Expander:
    """Decompresses a stream in parts of at most 1 MiB."""

    def __init__(self, encoding: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", *_WINDOWS):
            raise RefusedError(415, f"Content-Encoding {encoding!r} is not known; expected gzip or deflate")
        self.zlib = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
        self._begun = False

    def __call__(self, chunk: bytes) -> Iterator[bytes]:
        if self.zlib is None:
            yield chunk
            return
        self._begun = self._begun or bool(chunk)
        part = b""
        while chunk or len(part) == _PIECE_BYTES:
            try:
                part = self.zlib.decompress(chunk, _PIECE_BYTES)
            except zlib.error as error:
                raise RefusedError(400, f"the body cannot be decompressed: {error}") from None
            if self.zlib.unused_data:
                raise RefusedError(400, "there is more behind the end of the compressed body")
            yield part
            chunk = self.zlib.unconsumed_tail

    def end(self) -> None:
        if self.zlib is not None and self._begun and not self.zlib.eof:
            raise RefusedError(400, "the compressed body is cut off")


async def compress(content: bytes, accepted: str) -> tuple[dict[str, str], bytes]:
    """The content in an encoding that the client's `Accept-Encoding` names, gzip before deflate, and the headers that say so.

    Without that, and for less than `SMALLEST_BYTES`, the content itself.
    """
    if not accepted or len(content) < SMALLEST_BYTES:
        return {}, content
    weights = dict(map(_weight, accepted.lower().split(",")))
    chosen = next((name for name in ("gzip", "deflate") if weights.get(name, 0) > 0), None)
    if chosen is None:
        return {}, content
    packed = await asyncio.to_thread(_packed, content, _WINDOWS[chosen])
    return {"Content-Encoding": chosen, "Vary": "Accept-Encoding"}, packed


def _weight(text: str) -> tuple[str, float]:
    """An encoding and its weight, of `gzip;q=0.5`. Without a weight 1, and 0 for one that is no number."""
    name, _, parameter = text.partition(";")
    key, _, value = parameter.partition("=")
    try:
        return name.strip(), float(value) if key.strip() == "q" else 1.0
    except ValueError:
        return name.strip(), 0.0


def _packed(content: bytes, window: int) -> bytes:
    packing = zlib.compressobj(_LEVEL, zlib.DEFLATED, window)
    return packing.compress(content) + packing.flush()


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the request is larger than {limit} bytes, which is all that is taken")
