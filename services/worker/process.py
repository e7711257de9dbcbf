"""Starting, waiting for and ending a script: the one module that knows how.

How nothing of a job is missed. A script leads a session of its own, and this process is a subreaper:
whoever's parent dies becomes our child. Once a script has ended, every process it left is therefore our
child or lies below one, and one reading of our children, which costs microseconds, proves that nothing is
left. Whose an orphan is, its tag says (proc.py). Only this process reaps its children, so the pid of a child
cannot be given away between a look at it and a signal to it. (Where the kernel was built without
/proc/PID/task/TID/children, all of /proc is read instead: slower, and the proof needs the second look.)

A script that has ended stays unreaped until `forget`: its status is kept by the kernel, so it survives the
death of this process, whose children then fall to the keeper (keeper.py). A script that an earlier worker
started is `Adopted`: waited for by its pidfd, its status taken from the record that its keeper writes.

What is not contained without cgroups: a process that takes off its tag (`ulimit -x unlimited`), leaves
session and group and clears its environment lives on while other jobs that could have begun it run; one that
has become another user, whom we may not signal, is waited for; what a job asks a daemon to start (cron,
docker, systemd-run) is none of its processes.

Three contracts for the rest of the worker: nobody else waits for children (never ``waitpid(-1)``), other child
processes, if any, stay in the worker's own session, where they are left alone, and scripts are started by the main
thread.
"""

import asyncio
import ctypes
import errno
import functools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from core.errors import RowlockError
from services.worker import proc
from services.worker.environment import MARK
from services.worker.loop import FolderRefused, StartUndone
from services.worker.spool import Exit, exit_of

_PR_SET_CHILD_SUBREAPER: Final = 36
_SHORTEST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.25

_SHORTAGES: Final = {
    errno.EAGAIN: "the node has no room for another process",
    errno.ENOMEM: "the node has no memory for another process",
    errno.EMFILE: "the worker has too many open files",
    errno.ENFILE: "the node has too many open files",
    errno.ETXTBSY: "the interpreter is being written at this moment",
}


class LaunchFailed(RowlockError):
    """A script cannot be started; the text says why in one sentence."""

    pid: int | None = None
    """As which process it has run for a moment, if it has."""


class LaunchShortage(LaunchFailed):
    """A script could not be started for want of something that comes back: try again later."""


class ExitLost(RowlockError):
    """A script has ended, and whoever could have told how was killed."""


class Script(Protocol):
    """A script that runs, or has ended and is not forgotten."""

    @property
    def pid(self) -> int:
        """As which process it was started."""

    async def wait(self) -> Exit:
        """Wait for the script itself to end; what it left behind is for `sweep`. May be called again."""

    def signal(self, number: int) -> None:
        """Send a signal to the script's process group, as long as the group is certainly its own."""

    def members(self) -> list[int]:
        """What is alive in the script's process group beside the script, as far as that can be seen."""

    def kill_leftovers(self) -> bool:
        """One look: whether anything alive was left beside the script; it has been sent SIGKILL."""

    def forget(self) -> None:
        """Let go of the exit status: its end is committed."""


@dataclass(slots=True, eq=False)
class Process:
    """A script that this process started. Made by `start`; to be given to `sweep` or `end`, then forgotten."""

    pid: int
    tag: int
    mark: str
    _inner: asyncio.subprocess.Process
    _begun: int
    _swept: bool = False

    @property
    def running(self) -> bool:
        """Whether the script itself has not ended, as far as the event loop knows."""
        return self._inner.returncode is None

    async def wait(self) -> Exit:
        """Wait for the script itself to end."""
        return exit_of(await self._inner.wait())

    def signal(self, number: int) -> None:
        """Send a signal to the group; its number is the script's own as long as it is not forgotten."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def members(self) -> list[int]:
        """Orphans of ours in the group."""
        return [pid for pid in _orphans_of(self) if os.getpgid(pid) == self.pid]

    def kill_leftovers(self) -> bool:
        """Kill every orphan that is this job's."""
        left = _orphans_of(self)
        for pid in left:
            _kill(pid)
        return bool(left)

    def forget(self) -> None:
        """Reap it."""
        self._swept = True
        if _scripts.pop(self.pid, None) is self:
            os.waitpid(self.pid, 0)


@dataclass(slots=True, eq=False)
class Adopted:
    """A script that an earlier worker of this node started, alive or dead; its keeper has, or writes, its record."""

    pid: int
    start: int
    tag: int
    mark: str
    record: Callable[[], Exit | None]
    """Its exit record, once there is one."""
    remove_records: Callable[[], None]
    kept_by: Callable[[int], bool]
    """Whether a process is a keeper, who will write the record of its dead child."""

    async def wait(self) -> Exit:
        """Wait for its end and its record. Raises ExitLost when there will be none."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self._is_there():  # the number is still its own
                    await _readable(pidfd)
            finally:
                os.close(pidfd)
        pause = _SHORTEST_PAUSE
        while (found := self.record()) is None:
            # The record is written before the process is reaped: gone without one is gone for good.
            if not self._is_kept() and self.record() is None:
                raise ExitLost("its exit code is lost: the worker and its keeper were both killed")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return found

    def signal(self, number: int) -> None:
        """Send a signal to the group, where its leader is still there: only then the number is certainly its own."""
        if self._is_there():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def members(self) -> list[int]:
        """Whatever bears the tag and is in the group."""
        return [pid for pid, stat in _tagged(self.tag, self.mark) if stat.group == self.pid and pid != self.pid]

    def kill_leftovers(self) -> bool:
        """Kill whatever bears the tag, wherever on this machine."""
        return _kill_tagged(self.tag, self.mark)

    def forget(self) -> None:
        """Remove its records."""
        self.remove_records()

    def _is_kept(self) -> bool:
        """Whether it is alive, or dead and somebody's who will write its record."""
        stat = proc.read_stat(self.pid)
        return stat is not None and stat.start == self.start and (not stat.dead or self.kept_by(stat.parent))

    def _is_there(self) -> bool:
        stat = proc.read_stat(self.pid)
        return stat is not None and stat.start == self.start


# The kernel keeps one list of children for the whole process, and so do these.
_scripts: dict[int, Process] = {}
_owners: dict[int, Process] = {}


@functools.cache
def become_subreaper() -> None:
    """Make this process the parent of whatever its descendants leave behind. `start` sees to it as well."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    proc.own_children()  # opens their list, for which there might be no descriptor later


async def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: int,
    stdout_fd: int,
    stderr_fd: int,
    tag: int,
    mark: str,
) -> Process:
    """Start a script as the leader of a new session, with stdin from /dev/null and nothing else inherited.

    `env` is the whole environment, `mark` is put into it, `tag` is set on the process. `cwd` is a descriptor
    of a folder (`files.Places`). The descriptors stay the caller's. Raises LaunchFailed, of which
    LaunchShortage may be tried again. Not cancelled halfway: it awaits nothing that waits.
    """
    become_subreaper()
    begun = proc.ticks_now()
    try:
        inner = await asyncio.create_subprocess_exec(  # type: ignore[call-arg]  # on loop.Loop
            *command,
            env={**env, MARK: mark},
            cwd=cwd,  # type: ignore[arg-type]
            stdin=os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC),
            stdout=stdout_fd,
            stderr=stderr_fd,
            tag=tag,
        )
    except StartUndone as error:
        undone = LaunchFailed(str(error))
        undone.pid = error.pid
        raise undone from error
    except ValueError as error:
        raise LaunchFailed(f"the command or its environment cannot be passed on: {error}") from error
    except OSError as error:
        raise _launch_failure(error, command[0]) from error
    process = _scripts[inner.pid] = Process(inner.pid, tag, mark, inner, begun)
    return process


def _launch_failure(error: OSError, program: str) -> LaunchFailed:
    number, text = error.errno or 0, os.strerror(error.errno or 0)
    if number in _SHORTAGES:
        return LaunchShortage(f"{_SHORTAGES[number]} ({text})")
    if number == errno.E2BIG:
        return LaunchFailed("the job's environment is larger than the system allows (Argument list too long)")
    if isinstance(error, FolderRefused):
        return LaunchFailed(f"the working directory cannot be entered ({text})")
    return LaunchFailed(f"{program} cannot be started ({text})")


async def end(script: Script, grace: float) -> None:
    """End a job: SIGTERM to its process group, `grace` seconds for the whole group, SIGKILL; then `sweep`.

    The group and not its leader alone has the grace: a shell dies of SIGTERM at once, while the program
    that it ran may be saving its state. `Script.wait` then tells how the script ended.
    """
    script.signal(signal.SIGTERM)
    script.signal(signal.SIGCONT)  # a stopped process hears nothing else
    with suppress(TimeoutError, ExitLost):
        async with asyncio.timeout(grace):
            await script.wait()
            await _group_gone(script)
    script.signal(signal.SIGKILL)
    await sweep(script)


async def sweep(script: Script) -> None:
    """Wait for a script's end, then end (SIGKILL) and reap whatever is left of the job: then nothing is.

    One look that finds nothing is proof. Once something was found it takes two, since what was killed may
    have left processes of its own. Waits as long as it takes: a process may be held up in the kernel.
    """
    with suppress(ExitLost):
        await script.wait()
    await _until_clean(script.kill_leftovers)
    if isinstance(script, Process):
        script._swept = True


async def end_stale(tag: int, mark: str) -> bool:
    """End (SIGKILL) whatever is left here of an attempt that is over, whoever started it; whether anything was."""
    return await _until_clean(lambda: _kill_tagged(tag, mark))


async def _until_clean(kill_leftovers: Callable[[], bool]) -> bool:
    clean, pause = 0, _SHORTEST_PAUSE
    if not kill_leftovers():
        return False
    while clean < 2:
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)
        clean = 0 if kill_leftovers() else clean + 1
    return True


def has_scripts() -> bool:
    """Whether scripts are left that this process started and has not forgotten."""
    return bool(_scripts)


def reap_orphans() -> None:
    """Reap what jobs left and what has died since; call it now and then (`sweep` does, too).

    A job that runs for days and lets go of a child every second would otherwise fill the table of processes.
    """
    _orphans()


def _kill(pid: int) -> None:
    """Kill a child of ours, and its group.

    Stopped first: from then on it cannot fork. Its group is the job's as well, for it lies within a session
    that was begun below the script; and one signal to a group ends even those that fork without pause.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)
        group = os.getpgid(pid)
        if group != os.getpgrp():
            os.killpg(group, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


async def _group_gone(script: Script) -> None:
    pause = _SHORTEST_PAUSE
    while script.members():
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _orphans_of(process: Process) -> list[int]:
    return [pid for pid, stat in _orphans() if _owner(pid, stat) is process]


def _orphans() -> list[tuple[int, proc.Stat]]:
    """Children of ours that are neither scripts nor in our own session; the dead among them are reaped.

    One that died after the list was read has left its own children to us, which the list does not have: so it is
    read until nothing was reaped.
    """
    while True:
        reaped, found = _look_at_children()
        if not reaped:
            return found


def _look_at_children() -> tuple[bool, list[tuple[int, proc.Stat]]]:
    ours, reaped = os.getsid(0), False
    found = []
    for pid in proc.own_children():
        stat = None if pid in _scripts else proc.read_stat(pid)
        if stat is None or stat.session == ours:
            continue
        if stat.dead:
            _owners.pop(pid, None)
            reaped |= os.waitpid(pid, os.WNOHANG) != (0, 0)
        else:
            found.append((pid, stat))
    return reaped, found


def _owner(pid: int, stat: proc.Stat) -> Process | None:
    """The job that an orphan belongs to; None as long as that is not proven."""
    known = _owners.get(pid)
    if known is not None and not known._swept:
        return known
    owner = _find_owner(pid, stat)
    if owner is not None:
        _owners[pid] = owner
    return owner


def _find_owner(pid: int, stat: proc.Stat) -> Process | None:
    """By its tag; one that took it off by its mark, its session or group, or because nobody else is left."""
    candidates = [process for process in _scripts.values() if not process._swept and process._begun <= stat.start]
    tag = proc.read_tag(pid)
    if tagged := [process for process in candidates if process.tag == tag]:
        return tagged[0]
    mark = proc.read_variable(pid, MARK)
    if marked := [process for process in candidates if process.mark == mark]:
        return marked[0]
    if kin := [process for process in candidates if process.pid in (stat.session, stat.group)]:
        return kin[0]
    return candidates[0] if len(candidates) == 1 else None


def _kill_tagged(tag: int, mark: str) -> bool:
    """Kill whatever bears the tag; whether anything did. Reads all of /proc."""
    left = _tagged(tag, mark)
    for pid, stat in left:
        proc.kill(pid, stat.start)
    return bool(left)


def _tagged(tag: int, mark: str) -> list[tuple[int, proc.Stat]]:
    """Whatever is alive and bears the tag or the mark, or is in a session with one that does."""
    ours = os.getsid(0)
    seen = [(pid, stat) for pid in proc.all_pids() if (stat := proc.read_stat(pid)) and not stat.dead]
    certain = [
        (pid, stat)
        for pid, stat in seen
        if stat.session != ours and (proc.read_tag(pid) == tag or proc.read_variable(pid, MARK) == mark)
    ]
    sessions = {stat.session for _, stat in certain}
    return [(pid, stat) for pid, stat in seen if stat.session in sessions]


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _settle, readable)
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
