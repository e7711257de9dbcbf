"""A wire to PostgreSQL, Redis or an HTTP server that can be cut, silenced, mended, also at a word of the client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from urllib.parse import parse_qs, urlsplit

CHUNK = 65536
PORTS = {"postgresql": 5432, "redis": 6379, "http": 80}


class Fault(Enum):
    """What becomes of a connection when its client says a word."""

    CUT_BEFORE = auto()
    """It ends, and the word did not arrive."""
    CUT_AFTER = auto()
    """It ends when the server has answered, and the answer did not arrive."""
    HOLE_BEFORE = auto()
    """Neither end hears of the other any more, and the word did not arrive."""
    HOLE_AFTER = auto()
    """Neither end hears of the other any more, and the word did arrive."""
    LATE = auto()
    """It arrives, and what follows it, once `deliver` is called."""


@dataclass(slots=True)
class _Trap:
    word: bytes
    fault: Fault
    away: bool
    times: int


@dataclass(slots=True, eq=False)
class _Wire:
    """One connection: both its ends, and what a trap did to it."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    struck: Fault | None = None

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """A port of 127.0.0.1 that leads to the server of a URL. Made by `proxied`."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._wires: set[_Wire] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = asyncio.Event()
        self._delivered = asyncio.Event()
        self._trap: _Trap | None = None
        self.port = 0
        self.tripped = asyncio.Event()
        """A trap has sprung."""

    @property
    def url(self) -> str:
        """The same server by this way."""
        account, at, _ = self._url.netloc.rpartition("@")
        scheme, path = ("redis", "") if self._url.scheme == "unix" else (self._url.scheme, self._url.path)
        return f"{scheme}://{account}{at}127.0.0.1:{self.port}{path}"

    async def mend(self) -> None:
        """Let new connections through, and what `silence` held up. No trap is set afterwards."""
        self._trap = None
        self._heard.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def cut(self, *, away: bool = True) -> None:
        """End every connection; while the server is `away`, until `mend`, new ones are refused."""
        if away:
            self._refuse()
        for wire in self._wires:
            wire.cut()

    def silence(self) -> None:
        """Let nothing pass, as a network that drops everything: it arrives after `mend`."""
        self._heard.clear()

    @property
    def silent(self) -> bool:
        """Whether nothing passes at this moment."""
        return not self._heard.is_set()

    def at(self, word: bytes, fault: Fault, *, away: bool = False, times: int = 1) -> None:
        """Strike the next connection whose client says the word, so many `times`.

        With `away` every other connection ends at once, and new ones are refused until `mend`.
        """
        self.tripped.clear()
        self._delivered.clear()
        self._trap = _Trap(word, fault, away, times)

    def deliver(self) -> None:
        """Let arrive what is LATE, though nobody may wait for it any more."""
        self._delivered.set()

    async def close(self) -> None:
        """End everything."""
        self.cut()
        while self._tasks:  # one that came at this moment may begin only now
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)

    def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _far_end(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._url.scheme == "unix":
            return await asyncio.open_unix_connection(self._url.path)
        query = parse_qs(self._url.query)
        host = self._url.hostname or query.get("host", ["127.0.0.1"])[0]
        port = self._url.port or int(query.get("port", [str(PORTS[self._url.scheme])])[0])
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.close())  # one that is cancelled at once never begins

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await self._far_end()
        except OSError:
            writer.transport.abort()
            return
        wire = _Wire((writer, far_writer))
        self._wires.add(wire)
        forth = asyncio.create_task(self._forth(wire, reader, far_writer))
        try:
            with suppress(OSError):
                await self._back(wire, far_reader, writer)
        finally:
            forth.cancel()
            await asyncio.gather(forth, return_exceptions=True)
            self._wires.discard(wire)
            for end in wire.writers:
                end.close()

    async def _forth(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the client says, until it has nothing to say any more or a trap springs."""
        before = b""
        try:
            while data := await reader.read(CHUNK):
                await self._heard.wait()
                if (trap := self._trap) is not None and trap.word in before[1 - len(trap.word) :] + data:
                    self._spring(trap, wire, writer, data)
                    if trap.fault is not Fault.LATE:
                        return
                    await self._delivered.wait()
                before = (before + data)[-CHUNK:]
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            wire.cut()

    async def _back(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the server says, until it has nothing to say any more."""
        while data := await reader.read(CHUNK):
            await self._heard.wait()
            if wire.struck not in (None, Fault.LATE):
                break
            writer.write(data)
            await writer.drain()
        if wire.struck in (Fault.HOLE_BEFORE, Fault.HOLE_AFTER):
            await asyncio.Event().wait()  # the end of a connection is not heard of either

    def _spring(self, trap: _Trap, wire: _Wire, writer: asyncio.StreamWriter, data: bytes) -> None:
        trap.times -= 1
        if trap.times == 0:
            self._trap = None
        wire.struck = trap.fault
        if trap.fault in (Fault.CUT_AFTER, Fault.HOLE_AFTER):
            writer.write(data)
        if trap.fault is Fault.CUT_BEFORE:
            wire.cut()
        if trap.away:
            self._refuse()
            for other in self._wires - {wire}:
                other.cut()
        self.tripped.set()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Proxy]:
    """A wire to the server of `url` until the end of the block."""
    proxy = Proxy(url)
    await proxy.mend()
    try:
        yield proxy
    finally:
        await proxy.close()
