"""Bodies that are too large, compressed, or not what they say."""

import contextlib
import gzip
import http.client
import zlib

import pytest

from .conftest import INFER, Server, call


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
