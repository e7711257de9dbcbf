"""What the kernel tells of processes, and the tag by which it tells whose they are.

A job's processes carry a tag that the kernel hands down by itself: the soft value of RLIMIT_LOCKS, a limit
without any effect since Linux 2.4.25 (getrlimit(2)), inherited across fork and exec, untouched by `setsid`
and `env -i`, readable by all in /proc/PID/limits, and there until the process is reaped: of a zombie too.

Only the standard library: the keeper uses this as well.
"""

import functools
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TAG_LIMIT: Final = 10
"""RLIMIT_LOCKS; the same number on x86-64 and arm64."""

_TAG_LINE: Final = b"Max file locks"
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_LIST_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Stat:
    """A line of /proc/PID/stat: proc(5). `start` is in clock ticks since boot."""

    state: str
    parent: int
    group: int
    session: int
    threads: int
    start: int

    @property
    def dead(self) -> bool:
        """Whether nothing is left of it but its exit status.

        A process whose first thread has ended is called a zombie while others run: nobody can reap it yet.
        """
        return self.state in "ZX" and self.threads <= 1


def tag_of(job_id: int, attempt: int, spool_id: str) -> int:
    """The tag of an attempt: 62 bits, never 0. The spool tells two Rowlocks on one machine apart."""
    digest = hashlib.blake2b(f"{job_id}:{attempt}:{spool_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 3 | 1 << 61


def read_tag(pid: int) -> int | None:
    """The tag of a process, dead or alive; None when it has none, or is gone."""
    try:
        return tag_of_process(pid)
    except OSError:
        return None


def tag_of_process(pid: int) -> int | None:
    """The tag of a process that is there, dead or alive; None when it has none. Raises OSError."""
    with open(f"/proc/{pid}/limits", "rb") as file:
        text = file.read()
    at = text.find(_TAG_LINE)
    words = text[at + len(_TAG_LINE) :].split(None, 1) if at >= 0 else []
    return int(words[0]) if words and words[0].isdigit() else None


def read_stat(pid: int) -> Stat | None:
    """The process's line, or None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, ") " included.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or hidden (hidepid)
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[17]), int(fields[19]))


def read_variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process began with; None if it has none or may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return None
    prefix = f"{name}=".encode()
    return next((os.fsdecode(v.removeprefix(prefix)) for v in variables if v.startswith(prefix)), None)


def own_children() -> list[int]:
    """Our own children, dead ones included: those that our main thread has begun, and all that have fallen to us.

    The kernel has a list for each thread, and what falls to a subreaper goes on that of its first one, the main thread
    (exit.c, find_alive_thread). None is missed: the kernel may skip one only when another before it in the list goes,
    and ours go when we reap them. The file stays open: to open it costs six times as much as to read it.
    """
    if (file := _own_list(os.getpid())) is None:
        return children(os.getpid())
    text = b""
    while piece := os.pread(file, _LIST_BYTES, len(text)):  # a page at most at a time
        text += piece
    return [int(pid) for pid in text.split()]


@functools.cache
def _own_list(pid: int) -> int | None:
    try:
        return os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def children(pid: int) -> list[int]:
    """The children of a process, dead ones included; empty if it is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    found: list[int] = []
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found.extend(map(int, file.read().split()))
        except ProcessLookupError:
            continue
        except FileNotFoundError:
            if not _lists_children():
                return [child for child in all_pids() if (line := read_stat(child)) and line.parent == pid]
    return found


@functools.cache
def _lists_children() -> bool:
    """Whether the kernel was built with CONFIG_PROC_CHILDREN."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def all_pids() -> Iterator[int]:
    """Every process that this PID namespace shows."""
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def now() -> float:
    """Seconds since boot, by a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ticks_now() -> int:
    """Now, as the kernel counts the start of a process: clock ticks since boot."""
    return int(now() * _TICKS_PER_SECOND)


def seconds_since(start: int) -> float:
    """Seconds since a process's start."""
    return now() - start / _TICKS_PER_SECOND


def kill(pid: int, start: int) -> None:
    """Kill a process that need not be a child of ours; the pidfd holds its number while it is looked at again."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # gone
        return
    try:
        stat = read_stat(pid)
        if stat is not None and stat.start == start:
            with suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def boot_identity() -> str:
    """What changes when every process that could be ours is gone: the boot, or the PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    first = read_stat(1)
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}:{first.start if first else 0}"
