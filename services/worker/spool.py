"""What a node keeps on disk beside its scripts: who it is, who keeps its processes, how they ended.

::

    SCRIPT_DIR/job-7.1                     the script of attempt 1 of job 7, from before its start to after its end; its
                                           time of change is a note (files.py): which process, and why it is ended
    SCRIPT_DIR/.spool/id                   the identity of this directory
    SCRIPT_DIR/.spool/node                 the node whose worker had the lock last: its are the scripts
    SCRIPT_DIR/.spool/boot                 the boot (and PID namespace) that everything here belongs to
    SCRIPT_DIR/.spool/lock                 held by the worker while it lives: who it is, whose child, and since when
    SCRIPT_DIR/.spool/replaced/START-PID   a worker that its successor had to kill: its keeper is not to start it again
    SCRIPT_DIR/.spool/keepers/START-PID    a keeper; one that ends in order removes it
    SCRIPT_DIR/.spool/exits/TAG.START.PID  how a session leader with that tag ended, written before it is reaped
    SCRIPT_DIR/.spool/granted/TAG          an attempt that may be requeued, from before its start to after its end; its
                                           time of change is 0 once a keeper has ended it
    SCRIPT_DIR/.spool/silence              its time of change, in seconds since boot: when keepers end those

Durable here means: survives the death of any process. Nothing is synced to disk: after a new boot nothing of
this is believed. Only the standard library: the keeper uses this as well.
"""

import fcntl
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.worker import proc

_FOLDER: Final = ".spool"
UNKNOWN: Final = 0
"""The tag that no attempt has: of a session leader that took its own off, whose it was nobody knows."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a script ended; exactly one is set. A signal is named without SIG: ``KILL``, ``RTMIN+3``."""

    exit_code: int | None
    signal: str | None


@dataclass(frozen=True, slots=True, order=True)
class Leader:
    """A session leader: its start in clock ticks since boot, and its pid. The least of a tag is the script."""

    start: int
    pid: int


@dataclass(frozen=True, slots=True)
class Holder:
    """The worker that holds a spool's lock, or held it last."""

    pid: int
    start: int
    keeper: int
    keeper_start: int
    since: int
    """The first incarnation of those in a row that had the lock as children of this keeper."""
    node: str


def exit_of(returncode: int) -> Exit:
    """An exit code, or minus the signal."""
    return Exit(returncode, None) if returncode >= 0 else Exit(None, signal_name(-returncode))


def signal_name(number: int) -> str:
    """The name of a signal without SIG."""
    if signal.SIGRTMIN < number <= signal.SIGRTMAX:
        return f"RTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)


@dataclass(frozen=True, slots=True)
class Spool:
    """The spool of one node, below its script directory."""

    script_dir: Path

    @property
    def folder(self) -> Path:
        """Where everything but the scripts lies."""
        return self.script_dir / _FOLDER

    def open(self) -> str:
        """Make it where it is missing; answer its identity."""
        for folder in (
            self.script_dir,
            self.folder,
            self.folder / "keepers",
            self.folder / "replaced",
            self.folder / "exits",
            self.folder / "granted",
        ):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _written_once(self.folder / "id", secrets.token_hex(16))

    def is_of_this_boot(self) -> bool:
        """Whether what is here belongs to the processes of this boot; also when it is new."""
        here = proc.boot_identity()
        return _written_once(self.folder / "boot", here) == here

    def begin_boot(self) -> None:
        """Forget the records of an earlier boot."""
        for path in (self.folder / "exits").iterdir():
            path.unlink(missing_ok=True)
        _replace(self.folder / "boot", proc.boot_identity())

    def keeps(self, pid: int) -> bool:
        """Whether a process is one of the keepers."""
        return pid in self.keepers()

    def keepers(self) -> set[int]:
        """The keepers that live."""
        names = (path.name for path in (self.folder / "keepers").iterdir())
        return {int(name.partition("-")[2]) for name in names if _lives(name)}

    def lock(self, node: str, keeper: int, incarnation: int) -> int | None:
        """Take the lock, for as long as this process lives; None when another worker has it, or scripts of another
        node lie here.

        Answers since which incarnation whoever had it was a child of the same keeper.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if self.node_of_scripts() not in (None, node):
            os.close(descriptor)
            return None
        _replace(self.folder / "node", node)  # whole, unlike the lock's own text
        mine, kept, before = proc.read_stat(os.getpid()), proc.read_stat(keeper), self._last()
        own = (keeper, kept.start) if kept and mine and mine.parent == keeper else (0, 0)
        kept_on = before is not None and own[0] and own == (before.keeper, before.keeper_start)
        since = before.since if before and kept_on and self.is_of_this_boot() else incarnation
        os.ftruncate(descriptor, 0)
        words = (os.getpid(), mine.start if mine else 0, *own, since, node)
        os.pwrite(descriptor, " ".join(map(str, words)).encode(), 0)
        return since  # the descriptor stays open

    def node_of_scripts(self) -> str | None:
        """Whose scripts of this boot lie here, if any do: that node alone knows which of them still run."""
        with suppress(FileNotFoundError):  # no worker has had the lock yet
            if self.is_of_this_boot() and any(self.script_dir.glob("job-*")):
                return (self.folder / "node").read_text(encoding="utf-8")
        return None

    def holder(self) -> "Holder | None":
        """The living worker that has the lock, if one has."""
        found = self._last()
        stat = proc.read_stat(found.pid) if found else None
        return found if found and stat is not None and stat.start == found.start and not stat.dead else None

    def _last(self) -> "Holder | None":
        """Whoever had the lock last, alive or not."""
        try:
            *words, node = (self.folder / "lock").read_text(encoding="utf-8").split(" ", 5)
            pid, start, keeper, keeper_start, since = map(int, words)
        except (FileNotFoundError, ValueError):
            return None
        return Holder(pid, start, keeper, keeper_start, since, node)

    def kill(self, holder: "Holder") -> None:
        """Kill a worker that does not stop, and leave word for its keeper that it was replaced."""
        self._replaced(Leader(holder.start, holder.pid)).touch()
        with suppress(ProcessLookupError, PermissionError):
            pidfd = os.pidfd_open(holder.pid)
            try:
                if self.holder() == holder:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def was_replaced(self, worker: Leader) -> bool:
        """Whether a worker was killed by its successor."""
        return self._replaced(worker).exists()

    def _replaced(self, worker: Leader) -> Path:
        return self.folder / "replaced" / f"{worker.start}-{worker.pid}"

    def forget_dead(self) -> None:
        """Remove the files of keepers that were killed, and of workers whose keepers are gone."""
        for path in (self.folder / "keepers").iterdir():
            if not _lives(path.name):
                path.unlink(missing_ok=True)
        if len(list((self.folder / "keepers").iterdir())) <= 1:  # our own: nobody asks any more
            for path in (self.folder / "replaced").iterdir():
                path.unlink(missing_ok=True)

    def record(self, tag: int, leader: Leader) -> Exit | None:
        """How a session leader ended, if that is written; it may have taken off its tag."""
        for written in (tag, UNKNOWN):
            with suppress(FileNotFoundError):
                word, number = self._record_path(written, leader).read_text(encoding="ascii").split()
                return exit_of(int(number) if word == "exited" else -int(number))
        return None

    def recorded(self, tag: int) -> Iterator[Leader]:
        """The session leaders with a tag whose ends are written."""
        for path in (self.folder / "exits").glob(f"{tag:016x}.*"):
            _, start, pid = path.name.split(".")
            yield Leader(int(start), int(pid))

    def recorded_tags(self) -> set[int]:
        """Every tag that something is written of."""
        return {int(path.name.partition(".")[0], 16) for path in (self.folder / "exits").iterdir()}

    def remove_records(self, tag: int) -> None:
        """Forget what is written of a tag: its job's end is committed."""
        for leader in self.recorded(tag):
            self._record_path(tag, leader).unlink(missing_ok=True)

    def write_record(self, tag: int, leader: Leader, returncode: int) -> None:
        """Write how a session leader ended, whole or not at all. Raises OSError, of a full disk for instance."""
        text = f"killed {-returncode}" if returncode < 0 else f"exited {returncode}"
        _replace(self._record_path(tag, leader), text)

    def grant(self, tag: int) -> None:
        """Say, before its start, that an attempt may be requeued. Raises OSError."""
        self._grant_path(tag).touch(mode=0o600)

    def end_grant(self, tag: int) -> None:
        """Forget a grant: its attempt is over."""
        self._grant_path(tag).unlink(missing_ok=True)

    def granted_tags(self) -> set[int]:
        """Every attempt that may be requeued."""
        return {int(path.name, 16) for path in (self.folder / "granted").iterdir()}

    def end_silence(self, until: float) -> None:
        """PostgreSQL was heard: what may be requeued is left alone until then, in seconds since boot.

        A time of change, because that needs no room on a full disk. Raises OSError.
        """
        descriptor = os.open(self.folder / "silence", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.utime(descriptor, (until, until))
        finally:
            os.close(descriptor)

    def silent_tags(self) -> set[int]:
        """Every attempt that may be requeued, once PostgreSQL has not been heard for too long."""
        try:
            silent = proc.now() >= (self.folder / "silence").stat().st_mtime
            return self.granted_tags() if silent else set()
        except FileNotFoundError:  # nobody has begun to count
            return set()

    def note_silence(self, tag: int) -> None:
        """Say that an attempt that may be requeued is ended because of that. Raises OSError."""
        os.utime(self._grant_path(tag), (0, 0))

    def ended_in_silence(self, tag: int) -> bool:
        """Whether a keeper has ended an attempt, or is about to."""
        with suppress(FileNotFoundError):
            return self._grant_path(tag).stat().st_mtime == 0
        return False

    def _grant_path(self, tag: int) -> Path:
        return self.folder / "granted" / f"{tag:016x}"

    def add_keeper(self, pid: int) -> Path:
        """Say that a process keeps others, before it does; the file is to be removed when it keeps none any more."""
        stat = proc.read_stat(pid)
        path = self.folder / "keepers" / f"{stat.start if stat else 0}-{pid}"
        path.touch(mode=0o600)
        return path

    def _record_path(self, tag: int, leader: Leader) -> Path:
        return self.folder / "exits" / f"{tag:016x}.{leader.start}.{leader.pid}"


def _lives(keeper: str) -> bool:
    start, _, pid = keeper.partition("-")
    stat = proc.read_stat(int(pid))
    return stat is not None and not stat.dead and stat.start == int(start)


def _written_once(path: Path, text: str) -> str:
    """The text of a file that is written by whoever comes first."""
    if not path.exists():
        fresh = _fresh(path, text)
        with suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_text(encoding="utf-8").strip()


def _replace(path: Path, text: str) -> None:
    _fresh(path, text).replace(path)


def _fresh(path: Path, text: str) -> Path:
    """A file beside the folder that is listed, on the same disk."""
    fresh = path.parents[path.parent.name == "exits"] / f"fresh-{path.name}.{os.getpid()}"
    try:
        fresh.write_text(text, encoding="utf-8")
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return fresh
