"""One role's way to PostgreSQL, which can lose the answer to a write that is named by its statement."""

import asyncio
import re
from dataclasses import dataclass, field

from core.db import allocations, jobs
from tests import proxy
from tests.proxy import CHUNK, Fault, Proxy, _Wire

# Parse: its name and its text; Bind: the statement's name, behind that of the portal, which asyncpg leaves empty.
PREPARED = re.compile(rb"P.{4}(__asyncpg_stmt_[0-9a-f]+__)\0([^\0]*)\0", re.DOTALL)
EXECUTED = re.compile(rb"B.{4}\0(__asyncpg_stmt_[0-9a-f]+__)\0", re.DOTALL)


SHOWN = 100
"""Characters of a statement by which it is known, also when a defect has changed what follows."""

# One for each hop of the straight line.
WRITES: dict[str, tuple[str, ...]] = {
    "api": (jobs._INSERT, jobs._CANCEL_WAITING, allocations._RELEASE),
    "scheduler": (allocations._PLACE,),
    "worker": (jobs._START, allocations._TURN_OVER, allocations._RELEASE),
}


@dataclass(slots=True)
class _Trap:
    """What waits for a write."""

    statement: bytes
    fault: Fault | None
    """None: it is held up, and everything with it, or it alone."""
    alone: bool = False


@dataclass(slots=True)
class _Session:
    """What is known of one connection."""

    statements: dict[bytes, bytes] = field(default_factory=dict)
    in_transaction: bool = False
    wrote: bool = False

    def commits(self, statement: bytes, data: bytes) -> bool:
        """Whether with these words of the client the write is committed: by itself, or with its transaction."""
        self.statements.update(PREPARED.findall(data))
        executed = [self.statements.get(name, b"") for name in EXECUTED.findall(data)]
        self.in_transaction |= b"BEGIN" in data
        self.wrote |= any(statement in text for text in executed)
        if b"COMMIT" in data or b"ROLLBACK" in data:
            self.in_transaction = False
        if self.in_transaction:
            return False
        wrote, self.wrote = self.wrote and b"ROLLBACK" not in data, False
        return wrote


class Wires(Proxy):
    """The wires of one role; it knows what was prepared on each, so that an execution is known by its statement."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._waiting: _Trap | None = None
        self._let_go = asyncio.Event()
        self._listening: set[_Wire] = set()

    def lose(self, statement: str, fault: Fault = Fault.CUT_AFTER) -> None:
        """Strike the connection on which the next such write commits, as it does."""
        self.tripped.clear()
        self._waiting = _Trap(statement.encode()[:SHOWN], fault)

    def hold(self, statement: str, *, alone: bool = False) -> None:
        """Fall silent at the next such statement, on its connection `alone` or on all; it arrives after `let_go`."""
        self.tripped.clear()
        self._let_go.clear()
        self._waiting = _Trap(statement.encode()[:SHOWN], None, alone)

    def let_arrive(self) -> None:
        """Let arrive what was held; what is lost stays so."""
        self._let_go.set()

    async def let_go(self) -> None:
        """Let arrive what was held, and lose nothing any more."""
        self.let_arrive()
        await self.mend()

    def keep(self) -> None:
        """Lose and hold nothing any more."""
        self._waiting = None

    def silence_listeners(self) -> int:
        """Let nothing pass any more on connections that listen, for ever; answer how many those are."""
        listening = [wire for wire in self._wires & self._listening if wire.struck is None]
        for wire in listening:
            wire.struck = Fault.HOLE_BEFORE
        return len(listening)

    async def mend(self) -> None:
        """As before; and nothing is lost any more."""
        self._waiting = None
        await super().mend()

    async def _forth(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = _Session()
        try:
            while data := await reader.read(CHUNK):
                await self._heard.wait()
                if wire.struck is not None:
                    return
                if b"LISTEN " in data:
                    self._listening.add(wire)
                trap = self._waiting
                if session.commits(trap.statement if trap else b"\0", data) and trap is not None:
                    self._waiting = None
                    if trap.fault is not None:
                        self._spring(proxy._Trap(b"", trap.fault, away=False, times=1), wire, writer, data)
                        return
                    if not trap.alone:
                        self.silence()
                    self.tripped.set()
                    await self._let_go.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            wire.cut()
        finally:
            self._listening.discard(wire)
