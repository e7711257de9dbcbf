"""The worker's event loop: uvloop's, with a `subprocess_exec` of our own below `asyncio.create_subprocess_exec`.

uvloop's own forks and copies page tables; asyncio's Popen costs twice as much CPU (design.md, traps). This one
calls posix_spawn, which is a vfork, waits on a pidfd, and leaves the ended child unreaped: its status stays in
the kernel, where it survives this process.
"""

import asyncio
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, Final

import uvloop

from services.worker.proc import TAG_LIMIT

_ALL_SIGNALS: Final = frozenset(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_HOME: Final = "/"


class FolderRefused(OSError):
    """The working directory cannot be entered."""


class StartUndone(Exception):
    """A child was started, as process `pid`, and ended again: it may have run for a moment."""

    def __init__(self, pid: int, text: str) -> None:
        super().__init__(text)
        self.pid = pid


class ChildTransport(asyncio.SubprocessTransport):
    """A child that is waited for by its pidfd, and reaped by `reap` alone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.SubprocessProtocol, pid: int) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._pid = pid
        self._returncode: int | None = None
        self._exited: asyncio.Future[int] = loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_exit)
        protocol.connection_made(self)

    def get_pid(self) -> int:
        return self._pid

    def get_returncode(self) -> int | None:
        return self._returncode

    def get_pipe_transport(self, fd: int) -> None:
        return None

    def is_closing(self) -> bool:
        return self._returncode is not None

    def close(self) -> None:
        """Nothing: a child outlives its transport."""

    async def _wait(self) -> int:
        return await asyncio.shield(self._exited)

    def _on_exit(self) -> None:
        found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._returncode = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        self._protocol.process_exited()
        self._exited.set_result(self._returncode)


class Loop(uvloop.Loop):
    """uvloop's loop; `subprocess_exec` starts tagged session leaders."""

    async def subprocess_exec(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.SubprocessProtocol],
        *command: str,
        stdin: int,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        cwd: int,
        tag: int,
        **_: Any,
    ) -> tuple[asyncio.SubprocessTransport, asyncio.SubprocessProtocol]:
        """Start `command` as the leader of a session of its own, in the folder that `cwd` is a descriptor of.

        Nothing is awaited, so nothing can be cancelled between the fork and what is known of it. `stdin` is a
        descriptor that is closed here once the child has it: its number is then free for the pidfd.
        Raises FolderRefused, OSError and ValueError; then nothing was started.
        """
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stderr))]
        try:
            _enter(cwd)
            limits = resource.getrlimit(TAG_LIMIT)
            resource.setrlimit(TAG_LIMIT, (tag, limits[1]))
            try:
                pid = os.posix_spawn(  # noqa: ASYNC221 - a vfork: it returns once the child has executed
                    command[0],
                    command,
                    env,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=_ALL_SIGNALS,
                )
            finally:
                resource.setrlimit(TAG_LIMIT, limits)
                os.chdir(_HOME)
        finally:
            os.close(stdin)
        protocol = protocol_factory()
        try:
            return ChildTransport(self, protocol, pid), protocol
        except OSError as error:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # noqa: ASYNC222 - it was killed
            raise StartUndone(pid, f"it was started, cannot be waited for, and was ended at once ({error})") from error


def _enter(folder: int) -> None:
    try:
        os.fchdir(folder)
    except OSError as error:
        raise FolderRefused(error.errno, error.strerror) from error


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The event loop that scripts are started from. Raises OSError where there are no pidfds, or no descriptors."""
    # As many as libuv needs up to its first pipe: where it cannot have that, it aborts (uv__signal_global_reinit).
    for descriptor in [os.pidfd_open(os.getpid()) for _ in range(4)]:
        os.close(descriptor)
    # posix_spawn closes nothing: what we inherited must not be handed on (what Python opens never is, PEP 446).
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    if threading.current_thread() is threading.main_thread():
        _put_away_signals()
    return Loop()


def _put_away_signals() -> None:
    """Children must not vanish with their exit codes, and we must hear what we were started deaf to (nohup)."""
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _nothing)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass
