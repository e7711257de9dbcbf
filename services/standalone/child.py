"""Child processes that end with this process, whatever ends it, and can be waited for from any event loop."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).with_name("shim.py")
_PIDFD_OPEN = 434  # the same number on every architecture


@dataclass(frozen=True, slots=True)
class Step:
    """One request to end, and the seconds that it is given."""

    signal: signal.Signals
    seconds: float


class Child:
    """A started process. It belongs to no event loop: start it under one, stop it under another."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        self.name = name
        self.process = process
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    async def wait(self) -> int:
        """Wait for its end: the exit code, or minus the signal that ended it."""
        if self.alive:
            await _readable(self.pid)
        return self.process.wait()

    async def ended_within(self, seconds: float, hasten: asyncio.Event | None = None) -> bool:
        """Wait for its end up to `seconds`, or until somebody is in a hurry."""
        waits = [asyncio.ensure_future(self.wait())]
        if hasten is not None:
            waits.append(asyncio.ensure_future(_set(hasten)))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return not self.alive

    async def stop(self, steps: Sequence[Step], hasten: asyncio.Event | None = None) -> int:
        """Ask by each step in turn until it ended, at last by SIGKILL. `hasten` cuts the first step short."""
        for step in steps:
            self.process.send_signal(step.signal)
            if await self.ended_within(step.seconds, hasten):
                return await self.wait()
            hasten = None
        self.process.kill()
        return await self.wait()


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    dying: signal.Signals,
    identity: str = "same",
    output: int | None = None,
    umask: int = -1,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
) -> Child:
    """Start `argv` in a session of its own (a Ctrl-C reaches only us); it gets `dying` when we are gone.

    To be called in the main thread: the kernel watches the thread that starts, not the process.
    """
    shim = (sys.executable, "-I", "-S", str(SHIM), str(int(dying)), str(os.getpid()), identity)
    process = subprocess.Popen(
        (*shim, *argv),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(env),
        cwd=cwd,
        umask=umask,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    return Child(name, process)


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


async def _set(event: asyncio.Event) -> int:
    await event.wait()
    return 0


async def _readable(pid: int) -> None:
    loop = asyncio.get_running_loop()
    pidfd = _pidfd_open(pid)
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, _settle, ended)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _pidfd_open(pid: int) -> int:
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)  # some builds of Python were made on kernel headers without it
    pidfd = int(libc.syscall(_PIDFD_OPEN, pid, 0))
    if pidfd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_open")
    os.set_inheritable(pidfd, False)
    return pidfd
