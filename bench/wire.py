"""HTTP/1.1 over one kept connection, and no more of it than the API speaks: a load generator must be light.

It shares the machine with what it measures, and says in each result what CPU it took.
"""

import asyncio
import json
import re
import socket
from dataclasses import dataclass
from typing import Any, cast

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


class WireError(Exception):
    """The connection broke, or what came is not what this client can read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


def request(method: str, path: str, port: int, document: object = None) -> bytes:
    """A request to 127.0.0.1 as it goes over the wire."""
    body = b"" if document is None else json.dumps(document).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
    kind = "Content-Type: application/json\r\n" if body else ""
    return f"{head}{kind}\r\n".encode() + body


def take(buffer: bytearray) -> Answer | None:
    """Take the answer out of the buffer; None while it is not whole."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(buffer[: end + 2])
    length = _LENGTH.search(head)
    if length is None:
        raise WireError(f"an answer without Content-Length: {head[:200]!r}")
    whole = end + 4 + int(length[1])
    if len(buffer) < whole:
        return None
    answer = Answer(int(head[9:12]), bytes(buffer[end + 4 : whole]))
    del buffer[:whole]
    return answer


class Line:
    """One blocking connection: where one request follows another, nothing is quicker or steadier."""

    def __init__(self, port: int, timeout_seconds: float) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()

    def ask(self, sent: bytes) -> Answer:
        """Send a request and wait for its answer. Raises WireError and OSError."""
        self._socket.sendall(sent)
        while (answer := take(self._buffer)) is None:
            piece = self._socket.recv(65536)
            if not piece:
                raise WireError("the API closed the connection")
            self._buffer += piece
        return answer

    def close(self) -> None:
        self._socket.close()


class Lane(asyncio.Protocol):
    """One connection of many in an event loop; one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, sent: bytes) -> Answer:
        """Send a request and wait for its answer. Raises WireError."""
        if self._transport is None:
            raise WireError("the API closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(sent)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            answer = take(self._buffer)
        except WireError as error:
            self._fail(error)
        else:
            if answer is not None and self._answer is not None and not self._answer.done():
                self._answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(WireError(f"the API closed the connection: {exc}"))

    def _fail(self, error: WireError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


async def open_lane(port: int) -> Lane:
    """Connect to 127.0.0.1."""
    _, lane = await asyncio.get_running_loop().create_connection(Lane, "127.0.0.1", port)
    return lane
