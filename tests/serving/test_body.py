"""Bodies that are too large, compressed, or not what they say."""

import asyncio
import contextlib
import gzip
import http.client
import json
import mmap
import zlib

import pytest

from deploy.errors import UnavailableError
from deploy.serving import body as serving_body
from deploy.serving.body import compress, in_time, read_body

from .conftest import INFER, Server, body, call
from .test_rest_door import talk_to


@pytest.mark.parametrize("packed", [False, True])
def test_a_request_that_is_too_large_is_refused_before_it_is_read_whole(limited: Server, packed: bool) -> None:
    plain = b" " * (64 << 20)
    data = gzip.compress(plain) if packed else plain[: 2 << 20]
    before = limited.resident_bytes
    status, document, _ = call(limited, INFER, data, {"Content-Encoding": "gzip"} if packed else {})
    assert (status, "larger than 1048576 bytes" in document["error"]) == (413, True)
    assert limited.resident_bytes - before < 16 << 20


def test_a_body_of_unknown_length_is_counted_while_it_comes(limited: Server) -> None:
    host, _, port = limited.http.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    with contextlib.closing(connection):
        connection.request(
            "POST", INFER, body=iter([b" " * (1 << 18)] * 8), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        assert connection.getresponse().status == 413
    assert call(limited, "/v2/health/live")[0] == 200


@pytest.mark.parametrize(
    ("data", "encoding", "status"),
    [
        (b"no gzip", "gzip", 400), (gzip.compress(b"{}", mtime=0)[:-4], "gzip", 400), (gzip.compress(b"{}", mtime=0) + b"more", "gzip", 400),
        (zlib.compress(b"{}"), "deflate", 400), (b"{}", "br", 415),
    ],
)  # fmt: skip
def test_compression_that_is_none(limited: Server, data: bytes, encoding: str, status: int) -> None:
    answered, document, _ = call(limited, INFER, data, {"Content-Encoding": encoding})
    assert answered == status
    assert document["error"]


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"), ("deflate", "deflate"), ("br, gzip;q=0.5, deflate", "gzip"), ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=nonsense", None), ("identity", None), ("", None),
    ],
)  # fmt: skip
def test_answers_are_compressed_as_the_client_asks(accepted: str, encoding: str | None) -> None:
    content = b"numbers, " * 1000
    headers, packed = asyncio.run(compress(content, accepted))
    assert headers.get("Content-Encoding") == encoding
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: lambda data: data}[encoding]
    assert unpack(packed) == content
    assert encoding is None or len(packed) < len(content) // 10
    assert asyncio.run(compress(b"short", accepted)) == ({}, b"short")


def test_the_doors_answer_is_compressed(limited: Server) -> None:
    host, _, port = limited.http.partition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        connection.request("POST", INFER, body(32), {"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Encoding"], answer.headers["Vary"]) == (200, "gzip", "Accept-Encoding")
        assert len(json.loads(gzip.decompress(answer.read()))["outputs"][0]["data"]) == 320


def test_a_body_that_expands_is_read_piece_by_piece_and_whole() -> None:
    async def read(chunks: list[bytes]) -> bytes:
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        return bytes(await read_body(receive, None, "gzip", 8 << 20))

    plain = bytes(range(256)) * (20 << 10)
    packed = gzip.compress(plain)
    assert asyncio.run(read([packed])) == plain
    assert asyncio.run(read([packed[:100], b"", packed[100:]])) == plain


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_comes_together_without_moving(declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bytes(range(251)) * (20 << 10)
    made: list[mmap.mmap] = []
    pages = serving_body._pages
    monkeypatch.setattr(serving_body, "_pages", lambda size: (made.append(pages(size)), made[-1])[1])

    async def read() -> object:
        chunks = [plain[at : at + 77_777] for at in range(0, len(plain), 77_777)]

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        return await read_body(receive, str(len(plain)) if declared else None, "", 8 << 20)

    found = asyncio.run(read())
    assert [found] == made, "the pages that it was written to at first"
    assert isinstance(found, mmap.mmap)
    assert (len(found), found[:]) == (len(plain), plain)


def test_no_memory_for_a_body_is_the_servers_trouble_and_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UnavailableError, match="no memory for a request of"):
        serving_body._Growing(1 << 30).add(b"a" * (2 << 20))


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/repository/models/net/unload", "/v2/cudasharedmemory/unregister"])
def test_a_document_without_tensors_is_small(path: str) -> None:
    def talk(host: str, port: int) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
            connection.request("POST", path, b'{"x": %s}' % (b" " * (2 << 20)))
            answer = connection.getresponse()
            return answer.status, answer.read()

    status, content = talk_to(talk)
    assert (status, b"larger than 1048576 bytes" in content) == (413, True)


def test_a_timer_is_set_only_where_there_is_something_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = []
    timeout = asyncio.timeout
    monkeypatch.setattr(asyncio, "timeout", lambda seconds: timers.append(seconds) or timeout(seconds))

    async def main() -> None:
        gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def at_once() -> int:
            return 1

        async def later() -> int:
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(gate.set_result, 2)
            return await gate

        async def refused() -> int:
            await asyncio.sleep(0)
            raise UnavailableError("no")

        left = []

        async def never() -> int:
            try:
                return await asyncio.get_running_loop().create_future()
            finally:
                left.append(True)

        assert await in_time(at_once(), 5) == 1
        assert not timers
        assert await in_time(later(), 5) == 2
        with pytest.raises(UnavailableError):
            await in_time(refused(), 5)
        with pytest.raises(TimeoutError):
            await in_time(never(), 0.01)
        assert timers == [5, 5, 0.01]
        waiting = asyncio.create_task(in_time(never(), 5))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert left == [True, True]

    asyncio.run(main())
