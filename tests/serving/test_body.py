"""Bodies that are too large, compressed, or not what they say."""

import asyncio
import contextlib
import gzip
import http.client
import json
import zlib

import pytest

from deploy.serving.body import compress, read_body

from .conftest import INFER, Server, body, call


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
