"""The keeper: the parent of a worker, so that jobs outlive it.

::

    rowlock worker            launcher: what the service manager sees; ends when the worker has ended for good
    └── keeper                this loop: starts the worker again when it dies; may linger until its last job ended
        └── worker            asyncio, services/worker/serve.py: in normal operation the parent of its scripts
            └── scripts

When the worker dies, its scripts, and whatever escaped from them, dead or alive, fall to the keeper, which is
a subreaper: it reaps them with the status as the kernel gives it, and before that writes one record for every
session leader that bears a tag (spool.py). The next worker finds its jobs by their tags and takes the status
from the record. A record that cannot be written (a full disk) is tried again: until then the process stays
unreaped, and its status in the kernel.

What may be requeued starts elsewhere once its node has been silent for long enough, so something here must have
ended it by then. That is the worker, unless it is stopped, frozen, or still waits for PostgreSQL itself: then it
is the keeper, which sees in the spool for how long nobody has heard PostgreSQL.

It needs no database and no settings, imports the standard library alone, and is small enough to never change.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.worker import proc
from services.worker.environment import MARK, tag_of_mark
from services.worker.spool import UNKNOWN, Leader, Spool

KEEPER_VARIABLE: Final = "ROWLOCK_KEEPER"
"""In the worker's environment: `PID:DESCRIPTOR`, the keeper and the pipe on which it wants the spool's path."""

EXIT_SETTINGS: Final = 2
EXIT_REPLACED: Final = 3
"""The worker's exit code when another one is this node's now: starting it again would be a quarrel."""

FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 10.0
STEADY_SECONDS: Final = 5.0
"""A worker that lived for longer is started again after FIRST_DELAY: while there is none, no time limit is kept."""
PAUSE_SECONDS: Final = 1.0
"""How often it looks when nothing tells it to: for records that could not be written, and for silence."""

_STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36


def launch(argv: Sequence[str]) -> int:
    """Start a keeper with its worker, pass signals on, and return the worker's last exit code.

    A process of its own, because the keeper may have to outlive it: a service manager waits for this one.
    """
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until each of the two can hear them
    keeper = os.fork()
    if keeper == 0:
        os.close(reading)
        _run_keeper(argv, writing)
    os.close(writing)
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: os.kill(keeper, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    answer = os.read(reading, 16)  # until the worker has ended for good, or the keeper was killed
    if answer:
        code, keeps = map(int, answer.split())
        if not keeps:
            os.waitpid(keeper, 0)  # it ends now: where nobody else reaps, it would stay a zombie
        return code
    print("rowlock worker: its keeper was killed; the worker itself goes on", file=sys.stderr)
    return 1


def _run_keeper(argv: Sequence[str], writing: int) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        os.setsid()
        keeper = Keeper([sys.executable, "-m", "services.worker.kept", *argv])
        code = keeper.keep()
        with suppress(BrokenPipeError):  # the launcher was killed: what we keep matters all the same
            keeps = bool(proc.children(os.getpid()))
            os.write(writing, f"{code} {keeps:d}".encode())
        os.close(writing)
        keeper.linger()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Keeper:
    """The parent of one worker at a time, and of what earlier ones left."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._worker = 0
        self._began = 0
        """The worker's start, in clock ticks since boot."""
        self._told = -1
        self._spool: Spool | None = None
        self._file: Path | None = None
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would vanish with their statuses
        signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, signal.SIGCHLD))
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_NAME, ctypes.c_char_p(b"rowlock-keeper"))

    def keep(self) -> int:
        """Keep a worker running until it ends for good; its exit code. Stop signals are passed on to it."""
        delay, stopping = FIRST_DELAY, False
        while True:
            began = time.monotonic()
            code, stopped = self._run_once()
            stopping = stopping or stopped
            if stopping and code == -signal.SIGTERM:
                return 0
            if stopping or code in (0, EXIT_SETTINGS, EXIT_REPLACED):
                return code
            if self._spool is not None and self._spool.was_replaced(Leader(self._began, self._worker)):
                return EXIT_REPLACED
            if time.monotonic() - began > STEADY_SECONDS:
                delay = FIRST_DELAY
            with suppress(OSError):  # nobody reads it, or the disk is full: no reason to end
                print(f"rowlock worker {_how(code)}; its jobs go on, and it is started again", file=sys.stderr)
                sys.stderr.flush()
            if self._told_to_stop_within(delay):
                return 0
            delay = min(delay * 2, LONGEST_DELAY)

    def _run_once(self) -> tuple[int, bool]:
        """One life of the worker: its exit code or minus its signal, and whether it was told to end."""
        try:
            self._start()
        except OSError:  # no room for a process, or no memory
            return 1, False
        return self._until_ended()

    def _told_to_stop_within(self, seconds: float) -> bool:
        """Look after everything for some time; whether a stop signal came."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._wait(left):
                return True
            self._look()
        return False

    def linger(self) -> None:
        """Keep what earlier workers left until nothing of it is left."""
        self._detach()
        self._look()
        while proc.children(os.getpid()):
            self._wait(PAUSE_SECONDS)
            self._look()
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def adopt(self, script_dir: Path) -> None:
        """Keep the children that this very process had before it became a keeper."""
        self._use(Spool(script_dir))

    def _detach(self) -> None:
        """Hold nothing that somebody could wait for: the terminal, a pipe to whoever started us."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)

    def _start(self) -> None:
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        environment = {**os.environ, KEEPER_VARIABLE: f"{os.getpid()}:{writing}"}
        try:
            self._worker = os.posix_spawn(self._command[0], self._command, environment, setsigmask=())
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        stat = proc.read_stat(self._worker)  # there, dead or alive: only we reap it
        self._began = stat.start if stat else 0
        os.set_blocking(reading, False)
        self._told = reading

    def _until_ended(self) -> tuple[int, bool]:
        """Look after everything until the worker has ended: its exit code or minus its signal, and whether told to."""
        stopped, code = False, None
        while code is None:
            if self._wait(PAUSE_SECONDS):
                stopped = True
                with suppress(ProcessLookupError):
                    # One that still imports is ended by it, in silence; a SIGINT would be a traceback.
                    os.kill(self._worker, signal.SIGTERM)
            self._hear()
            code = self._look()
        self._hear()
        os.close(self._told)
        return code, stopped

    def _wait(self, seconds: float) -> int:
        """Wait for a signal; its number when it is one that means stop, else 0."""
        info = signal.sigtimedwait((*_STOPS, signal.SIGCHLD), seconds)
        return info.si_signo if info is not None and info.si_signo in _STOPS else 0

    def _hear(self) -> None:
        """The worker says once where its spool is."""
        with suppress(BlockingIOError):
            if text := os.read(self._told, 4096):
                self._use(Spool(Path(os.fsdecode(text))))

    def _use(self, spool: Spool) -> None:
        if self._spool != spool:
            self._spool = spool
            self._file = spool.add_keeper(os.getpid())

    def _look(self) -> int | None:
        """Reap what has died; the worker's exit code when it is among them."""
        code = None
        try:
            self._end_in_silence()
            children = proc.children(os.getpid())
        except OSError:  # the node has no descriptors, or no memory: at the next look
            return None
        for pid in children:
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                continue
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            if pid == self._worker:
                code = status
            elif not self._recorded(pid, status):
                continue  # stays unreaped: its status is in the kernel
            os.waitpid(pid, 0)
        return code

    def _end_in_silence(self) -> None:
        """Kill what may soon be started elsewhere, without a warning: its grace period is over as well."""
        if self._spool is None or not (tags := self._spool.silent_tags()):
            return
        for pid in proc.all_pids():
            stat = proc.read_stat(pid)
            for tag in tags & {proc.read_tag(pid), tag_of_mark(proc.read_variable(pid, MARK))}:
                if stat is not None and not stat.dead:
                    with suppress(OSError):  # its end is committed, or the worker has to go by the exit alone
                        self._spool.note_silence(tag)
                    proc.kill(pid, stat.start)

    def _recorded(self, pid: int, status: int) -> bool:
        """Write the record of a dead process that may be a script; False when it has to be tried again."""
        try:
            stat = proc.read_stat(pid)
            if stat is not None and stat.session == pid and self._spool is not None:
                self._spool.write_record(proc.tag_of_process(pid) or UNKNOWN, Leader(stat.start, pid), status)
        except OSError:
            return False
        return True


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _prctl(option: int, value: object) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@dataclass(slots=True)
class _Mine:
    """What a worker knows of its own keeper; without one it is its own."""

    pid: int = 0
    script_dir: str = ""
    file: Path | None = None


_mine = _Mine()


def tell(script_dir: Path) -> None:
    """In a worker, before it starts anything: enter the keeper in the spool, and tell it where records belong."""
    pid, _, descriptor = os.environ.pop(KEEPER_VARIABLE, "").partition(":")
    _mine.script_dir = os.fspath(script_dir)
    _mine.pid = int(pid or os.getpid())
    _mine.file = Spool(script_dir).add_keeper(_mine.pid)
    if descriptor:
        with suppress(BrokenPipeError):
            os.write(int(descriptor), os.fsencode(script_dir))
        os.close(int(descriptor))


def pid() -> int:
    """In a worker: its keeper, dead or alive."""
    return _mine.pid


def lives() -> bool:
    """In a worker: whether its keeper is there to take over what it leaves."""
    return _mine.pid == os.getppid()


def leave(*, scripts: bool) -> None:
    """In a worker that ends: see to it that somebody keeps the scripts that it leaves, if there are any."""
    if scripts and not lives():
        _become()
    if _mine.pid == os.getpid() and _mine.file is not None:
        _mine.file.unlink(missing_ok=True)


def _become() -> None:
    """Turn this very process, whose keeper was killed, into one that lingers: its children stay its children.

    Its successor waits for the spool's lock, which the exec gives back: by then it must be known as a keeper.
    """
    Spool(Path(_mine.script_dir)).add_keeper(os.getpid())
    os.execv(sys.executable, [sys.executable, "-m", "services.worker.keeper", _mine.script_dir])  # noqa: S606


if __name__ == "__main__":
    lingering = Keeper(())
    lingering.adopt(Path(sys.argv[1]))
    lingering.linger()
