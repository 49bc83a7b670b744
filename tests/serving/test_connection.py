"""Connections that send no request, or one without an end, or read no answer: the server bounds what it holds, and for how long."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.serving.connection import network_of
from deploy.serving.guard import Limits
from deploy.serving.rest_door import HttpDoor

from .conftest import Server
from .test_rest_door import talk_to

MIB = 1 << 20
HEAD = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "short lines": (431, HEAD, b"a: b\r\n" * 10_000),
    "empty lines": (431, b"", b"\r\n" * 32_768),
    "one long value": (431, HEAD + b"a: ", b"a" * (64 << 10)),
    "one long name": (431, HEAD, b"a" * (64 << 10)),
    "a long target": (431, b"GET /", b"a" * (64 << 10)),
    "fields behind the body": (431, CHUNKED + b"0\r\n", b"a: b\r\n" * 10_000),
    "one long field behind the body": (431, CHUNKED + b"0\r\na: ", b"a" * (64 << 10)),
    "an extension of a chunk": (431, CHUNKED + b"1;", b"a" * (64 << 10)),
    "requests on one connection": (400, b"", HEAD * 3000),
}


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_is_refused_before_it_is_held(limited: Server, kind: str) -> None:
    status, start, more = FLOODS[kind]
    before, sent = resident(limited.process.pid), 0
    host, _, port = limited.http.partition(":")
    with socket.create_connection((host, int(port)), 10) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(start)
            while sent < 80 * MIB:
                client.sendall(more)
                sent += len(more)
        assert sent < 80 * MIB
        with contextlib.suppress(ConnectionError):  # the answer may go with a connection that is reset
            answer = client.recv(4096)
            if answer and kind != "requests on one connection":
                assert answer.startswith(b"HTTP/1.1 %d " % status)
                assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    assert resident(limited.process.pid) - before < 16 * MIB


def test_fields_within_the_limits_are_taken(limited: Server) -> None:
    host, _, port = limited.http.partition(":")
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(HEAD + b"".join(b"x-%d: %s\r\n" % (index, b"a" * 500) for index in range(100)) + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD, HEAD + b"\r\n" + HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes) -> None:
    def talk(host: str, port: int) -> None:
        with socket.create_connection((host, port), 10) as client:
            start = time.monotonic()
            client.sendall(sent)
            heard = b"".join(iter(lambda: client.recv(4096), b""))
            assert 0.3 < time.monotonic() - start < 3
        assert (b"HTTP/1.1 408 " in heard) == (sent != b"")
        assert heard.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")

    talk_to(talk, limits=Limits(body_s=0.4))


def test_a_client_that_reads_no_answer_is_left() -> None:
    def talk(host: str, port: int) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, port))
            client.settimeout(10)
            with pytest.raises(ConnectionError):
                while True:  # answers that nobody reads; the server stops to read, and leaves
                    client.sendall((HEAD + b"\r\n") * 10)
                    time.sleep(0.001)

    talk_to(talk, limits=Limits(body_s=0.5))


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Callable[[], HttpDoor]:
    opened: list[HttpDoor] = []
    init = HttpDoor.__init__
    monkeypatch.setattr(HttpDoor, "__init__", lambda self, *rest: (init(self, *rest), opened.append(self))[0])
    return lambda: opened[-1]


def test_nothing_is_kept_of_connections_that_have_gone(doors: Callable[[], HttpDoor]) -> None:
    def talk(host: str, port: int) -> None:
        for sent in (b"", HEAD, HEAD + b"\r\n"):
            for _ in range(5):
                with socket.create_connection((host, port), 10) as client:
                    client.sendall(sent)
                    if sent.endswith(b"\r\n\r\n"):
                        assert client.recv(4096)
        time.sleep(0.2)
        assert not doors().room.idle

    talk_to(talk)


def test_one_address_takes_no_more_than_its_share(doors: Callable[[], HttpDoor]) -> None:
    def talk(host: str, port: int) -> None:
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(socket.create_connection((host, port), 5, ("127.0.0.2", 0)))
            silent = [stack.enter_context(socket.create_connection((host, port), 5)) for _ in range(6)]
            for left in silent[:3]:
                with contextlib.suppress(ConnectionResetError):
                    assert left.recv(1) == b"", "the longest idle of the address are closed"
            for kept in (other, *silent[3:]):
                kept.sendall(HEAD + b"\r\n")
                assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.2)
        assert not doors().room.idle
        assert not doors().room._by_address

    talk_to(talk, connections_per_address=3)


def test_a_connection_too_many_of_a_busy_address_is_closed_and_the_busy_are_answered() -> None:
    def talk(host: str, port: int) -> None:
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(socket.create_connection((host, port), 5)) for _ in range(2)]
            for client in busy:
                client.sendall(b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
            time.sleep(0.2)
            third = stack.enter_context(socket.create_connection((host, port), 5))
            with contextlib.suppress(ConnectionResetError):
                assert third.recv(1) == b""
            for client in busy:
                client.sendall(b"}")
                assert client.recv(4096).startswith(b"HTTP/1.1 200 ")

    talk_to(talk, connections_per_address=2)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"), ("", ""),
    ],
)  # fmt: skip
def test_an_address_of_ipv6_counts_by_its_network(host: str, network: str) -> None:
    assert network_of(host) == network


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_a_client_that_would_speak_another_protocol_gets_http_and_no_line_in_the_log(
    protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(host: str, port: int) -> None:
        with socket.create_connection((host, port), 10) as client:
            client.sendall(HEAD + b"Connection: Upgrade\r\nUpgrade: %s\r\n\r\n" % protocol.encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")

    talk_to(talk)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn") and record.levelname == "WARNING"]
