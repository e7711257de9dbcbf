"""The stack under test: that of `rowlock demo`, real processes and real servers in a fresh directory.

Nothing is deleted before the last measurement is over. On an ext4 without a journal a file costs more to make
for some minutes after many were deleted: its allocator steps over every inode that was freed lately.
"""

import os
import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.apart import ROOT, BenchError
from core.db.audit import audit
from services.standalone.embedded import EmbeddedPostgres

START_SECONDS = 90.0
STOP_SECONDS = 60.0
DURABILITY = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_level")


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack: its process, the port of its API, its database."""

    pid: int
    port: int
    database_url: str


@contextmanager
def workspace() -> Iterator[Path]:
    """A directory for the directories of all stacks; removed afterwards, also when we are killed.

    In TMPDIR, else in /var/tmp: that is a disk also where /tmp is memory, whose fsync costs nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="rowlock-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    remover = subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", _REMOVE, str(folder)),
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert remover.stdin is not None
    try:
        yield folder
    finally:
        remover.stdin.close()  # its word to begin; our death says it as well
        with suppress(subprocess.TimeoutExpired):
            remover.wait(STOP_SECONDS)


# Again and again for a while: when we were killed, a stack in there is only just stopping.
_REMOVE = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.5)
"""


@contextmanager
def running(workspace: Path, cpus: int) -> Iterator[Stack]:
    """A stack whose node has `cpus` CPUs, in a new directory; afterwards it is gone, the directory is not.

    It ends with our end of its stdin, so also when we are killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="stack-", dir=workspace))
    process = subprocess.Popen(
        (sys.executable, "-m", "services.standalone.throwaway", "--cpus", str(cpus), "--directory", str(folder)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    try:
        yield Stack(process.pid, _port(process, folder), EmbeddedPostgres(folder).url)
    finally:
        _end(process)


def _port(process: "subprocess.Popen[bytes]", folder: Path) -> int:
    """The port of the stack's API, once it is ready."""
    port = 0
    try:
        for word, value in _told(process, time.monotonic() + START_SECONDS):
            match word:
                case "port":
                    port = int(value)
                case "ready":
                    return port
                case "failed":
                    raise BenchError(value)
        raise BenchError("its process ended")
    except BenchError as error:
        raise BenchError(f"the stack did not start: {error}{_tails(folder)}") from None


def _told(process: "subprocess.Popen[bytes]", deadline: float) -> Iterator[tuple[str, str]]:
    """What the stack's process tells, a word and its value a line."""
    assert process.stdout is not None
    buffer = b""
    while True:
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            word, _, value = line.decode(errors="replace").partition(" ")
            yield word, value
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise BenchError(f"it took more than {START_SECONDS:g} s")
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            return
        buffer += piece


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    for hasten in (process.terminate, process.kill):
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            break
        hasten()
    process.wait()
    process.stdout.close()


def _tails(folder: Path) -> str:
    lines: list[str] = []
    for path in (*sorted(folder.glob("*.log")), *sorted((folder / "logs").glob("*"))):
        with suppress(OSError), path.open(errors="replace") as text:
            lines += [f"--- {path.name}", *(line.rstrip() for line in deque(text, 10))]
    return "".join(f"\n{line}" for line in lines)


async def durability(database_url: str) -> dict[str, str]:
    """The server's own word for what it promises."""
    connection = await asyncpg.connect(database_url)
    try:
        return {name: await connection.fetchval("SELECT current_setting($1)", name) for name in DURABILITY}
    finally:
        await connection.close()


async def broken_invariants(connection: asyncpg.Connection) -> list[str]:
    """What `core.db.audit` finds."""
    return sorted({broken.invariant for broken in await audit(connection)})


@dataclass(frozen=True, slots=True)
class Written:
    """How much the database server has written so far: transactions that wrote, and bytes of WAL."""

    transactions: int
    wal_bytes: int


async def written(connection: asyncpg.Connection) -> Written:
    """Exact at this moment, which the statistics views are not: backends report to those when they like to."""
    row = await connection.fetchrow(
        "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint,"
        " pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
    )
    assert row is not None
    return Written(*row)
