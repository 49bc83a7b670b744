"""A connection over HTTP with bounds: on the size and the age of what is not yet a request, on pipelining, and on slow readers.

uvicorn's protocol for httptools holds a head of any size in memory, and waits for ever for its end. RFC 6585 has the status 431, and
RFC 9110 408.
"""

import ipaddress
import time
from collections import OrderedDict, defaultdict
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 << 10
"""The most bytes of a request's target and header fields, and of what follows the body; other servers take 8 to 64 KiB."""

HEAD_FIELDS = 256
"""The most header fields."""

PIPELINED = 64
"""The most requests that may wait on one connection behind the one that is answered."""

SLOWEST_BYTES = 64 << 10
"""What a client must read of an answer in the time that it has for a request."""

_BEYOND = 64
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class Room:
    """The connections without a request, longest idle first. most: of all connections together; of_address: of those from one address.

    When there are more, the longest idle is closed: nobody is kept out by connections that ask nothing.
    """

    def __init__(self, most: int, of_address: int | None = None) -> None:
        self.most = most
        self._of_address = of_address
        self._by_address: defaultdict[str, set[Connection]] = defaultdict(set)
        self.idle: OrderedDict[Connection, float] = OrderedDict()
        """Since when each is idle, on the monotonic clock."""

    def enter(self, connection: "Connection") -> None:
        """A connection has no request now."""
        self.idle[connection] = time.monotonic()

    def count(self, connection: "Connection") -> None:
        """Count a new connection, which is idle. Where its address has too many, close the longest idle of them, if need be this one."""
        if self._of_address is None:
            return
        same = self._by_address[connection.address]
        same.add(connection)
        if len(same) > self._of_address:
            longest = next(each for each in self.idle if each in same)
            self.leave(longest)
            longest.transport.abort()

    def leave(self, connection: "Connection") -> None:
        """A connection is closed."""
        self.idle.pop(connection, None)
        same = self._by_address.get(connection.address)
        if same is not None:
            same.discard(connection)
            if not same:
                del self._by_address[connection.address]

    def keep_to_most(self, connections: set[Any]) -> None:
        """Close the longest idle of too many connections. A few more may come in while all are busy, to ask whether the server lives."""
        over = len(connections) - self.most
        if over > 0 and (len(self.idle) > 1 or over > _BEYOND):
            longest = next(iter(self.idle))
            self.leave(longest)
            connections.discard(longest)
            longest.transport.abort()


def network_of(host: str) -> str:
    """An address of IPv4, or the /64 network of one of IPv6; the text itself where it is neither."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, bounded. room: shared by all connections of a server."""

    def __init__(self, *args: Any, room: Room, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room = room
        self.address = ""
        """Of the client, of which it has one: for IPv6 the network, whose 2^64 addresses belong to one client."""
        self._in_head = True
        self._begun = 0.0
        self._asked = False
        self._quiet = self._fields = self._size = 0
        self._refusal: tuple[int, str] | None = None
        self._unread: tuple[int, float] | None = None

    # What comes in.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = network_of(self.client[0]) if self.client else ""
        self._room.enter(self)
        self._room.count(self)
        self._room.keep_to_most(self.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head and not self._begun:
            self._begun = time.monotonic()
        self._quiet += len(data)
        super().data_received(data)
        # A parser keeps a field that is not whole: a size without any progress is one field, or as good as one.
        if self._quiet - len(data) > HEAD_BYTES and not self.transport.is_closing():
            self.refuse(431, f"a header field is larger than {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._begun = time.monotonic()
        self._fields = self._size = self._quiet = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # fields behind the body are of no use here, and are not kept
            super().on_header(name, value)
        self._count(len(name) + len(value) + 4, 1)

    def _count(self, size: int, fields: int) -> None:
        self._size += size
        self._fields += fields
        self._quiet = 0
        if self._size > HEAD_BYTES or self._fields > HEAD_FIELDS:
            self._refusal = (431, f"the header of a request may have {HEAD_BYTES} bytes and {HEAD_FIELDS} fields")
            raise ValueError(self._refusal[1])  # the parser hands it to `send_400_response`

    def on_headers_complete(self) -> None:
        self._in_head, self._begun, self._asked = False, 0.0, True
        self._size = self._fields = self._quiet = 0
        self._room.idle.pop(self, None)
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED:
            self._refusal = (400, f"more than {PIPELINED} requests wait on one connection")
            raise ValueError(self._refusal[1])

    def on_body(self, body: bytes) -> None:
        self._quiet = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._quiet = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing() and self.cycle.response_complete:
            self._in_head = True
            self._room.enter(self)

    def _unsupported_upgrade_warning(self) -> None:
        """A client that would rather speak another protocol gets an answer over HTTP, and needs no line in the log."""

    # What is refused.

    def send_400_response(self, msg: str) -> None:
        self.refuse(*(self._refusal or (400, "this is no HTTP request")))

    def refuse(self, status: int, why: str) -> None:
        """Answer, unless an answer has begun, and close the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            content = msgspec.json.encode({"error": why})
            lines = (b"HTTP/1.1 %d %s" % (status, _REASONS[status]), b"content-type: application/json", b"connection: close")
            self.transport.write(b"\r\n".join((*lines, b"content-length: %d" % len(content), b"", content)))
        self.transport.close()

    def look(self, now: float, seconds: float) -> None:
        """Close the connection if it has had more than `seconds` for a head, or to read `SLOWEST_BYTES` of an answer."""
        unread = self.transport.get_write_buffer_size()
        if unread and (self.flow.write_paused or self.transport.is_closing()):
            if self._unread is None or unread <= self._unread[0] - SLOWEST_BYTES:
                self._unread = (unread, now)
            elif now - self._unread[1] > seconds:
                self.transport.abort()
            return
        self._unread = None
        if self.transport.is_closing():
            return
        since = self._room.idle.get(self)
        if since is None:
            return
        if self._begun and now - self._begun > seconds:
            self.refuse(408, f"the request did not come within {seconds:g} s")
        elif not self._begun and not self._asked and now - since > seconds:
            self.transport.close()
