"""The files of a job: its output below allowed folders, without following symbolic links, and its script.

A path is walked name by name with descriptors, so that a link put there at any moment is refused and not
followed. The allowed folders themselves belong to the operator: links on the way to them are followed.
"""

import errno
import fcntl
import functools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from core.errors import RowlockError
from core.records import Attempt
from services.worker.process import LaunchFailed

NULL: Final = "/dev/null"
MAX_SHEBANG: Final = 255
"""Bytes of a first line that the kernel looks at (BINPRM_BUF_SIZE less one)."""

_SCRIPT: Final = re.compile(r"job-([0-9]+)\.([0-9]+)", re.ASCII)
# The kernel takes what follows the interpreter as one argument, blanks within it included (binfmt_script.c).
_SHEBANG: Final = re.compile(r"#![ \t]*([^ \t]+)(?:[ \t]+(.*?))?[ \t]*", re.DOTALL)
# O_PATH: a folder that one may pass through, but not list, is good enough.
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: the open of a FIFO must not hang; what came of it is looked at afterwards.
_FOUND: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


SPARE: Final = "spare-"
"""How the names of files begin that were a script's, and will be another's."""
MAX_SPARE: Final = 64
_PIDS: Final = 2**22
"""No process has so high a number (PID_MAX_LIMIT), in seconds the 18th of February 1970."""


class Why(IntEnum):
    """Why a script is being ended."""

    TIME_LIMIT = 1
    CANCEL = 2
    STOP = 3
    SILENCE = 4
    """Its node did not hear PostgreSQL for too long."""


@dataclass(frozen=True, slots=True)
class Note:
    """What is noted on a script's file: as which process it was started, and why that is being ended, if it is.

    It is the file's time of change, because that needs no room on a full disk, in whole seconds, which every file
    system keeps. A script that touches its file takes the note off, or forges one: of itself alone.
    """

    pid: int
    why: Why | None = None


class FileRefused(RowlockError):
    """A path that a job may not use: outside the allowed folders, a symbolic link, or no regular file."""


class Places:
    """The folders and output files of one start, below `roots`: each folder is walked to once.

    A context manager: at its end every descriptor is closed, those of the child are its own by then. Raises
    FileRefused and OSError.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._folders: dict[str, int] = {}
        self._outputs: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for descriptor in (*self._folders.values(), *self._outputs.values()):
            os.close(descriptor)

    def folder(self, path: str) -> int:
        """A descriptor (O_PATH) of a folder at or below a root, made if missing.

        Given to `process.start` as its `cwd`, the job works in this very folder whatever happens to its path
        meanwhile.
        """
        if path not in self._folders:
            self._folders[path] = _walk(*_located(self._roots, path), create=True)
        return self._folders[path]

    def output(self, path: str, *, append: bool) -> int:
        """An output file open for writing; missing folders are made. Emptied unless `append`.

        Writes always go to the end (O_APPEND, as in Slurm), so two descriptors of one file never overwrite each
        other. ``/dev/null`` is allowed, spelled so.
        """
        if path not in self._outputs:
            self._outputs[path] = self._open(path, append=append)
        return self._outputs[path]

    def _open(self, path: str, *, append: bool) -> int:
        if path == NULL:
            return os.open(NULL, os.O_WRONLY | os.O_CLOEXEC)
        above, _, name = path.rpartition("/")
        folder = self.folder(above or "/")
        with suppress(FileExistsError):
            return os.open(name, os.O_WRONLY | os.O_APPEND | _NEW, 0o644, dir_fd=folder)
        # Not O_TRUNC: the file is emptied only once it is known to be one.
        descriptor = _open_regular(folder, path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with _closed_on_error(descriptor):
            if not append:
                os.ftruncate(descriptor, 0)
        return descriptor


def open_for_reading(roots: Sequence[Path], path: str) -> int:
    """Open a regular file below one of `roots`; the caller closes it. Raises FileRefused and OSError."""
    return _open_found(roots, path, os.O_RDONLY)


def length(roots: Sequence[Path], path: str) -> int | None:
    """How many bytes an output file holds that may be appended to; None where there is none. Raises as `output`."""
    if path == NULL:
        return None
    try:
        descriptor = _open_found(roots, path, os.O_WRONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _open_found(roots: Sequence[Path], path: str, flags: int) -> int:
    root, names = _located(roots, path)
    if not names:
        raise FileRefused(f"{path} is a folder")
    folder = _walk(root, names[:-1], create=False)
    try:
        return _open_regular(folder, path, flags)
    finally:
        os.close(folder)


def _located(roots: Sequence[Path], path: str) -> tuple[str, list[str]]:
    """The root that `path` lies in, as its spelling says, and the names below it."""
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise FileRefused(f"{path} must be an absolute path without '..'")
    for root in roots:
        for spelled in _spellings(root):
            if path == spelled or path.startswith(f"{spelled}/"):
                return spelled or "/", [name for name in path[len(spelled) :].split("/") if name]
    raise FileRefused(f"{path} lies outside the allowed folders ({', '.join(map(str, roots))})")


@functools.cache
def _spellings(root: Path) -> tuple[str, ...]:
    """How paths below a root may begin: as the operator wrote it, and as it really is."""
    return tuple({str(root).rstrip("/"): None, str(root.resolve()).rstrip("/"): None})


def _walk(root: str, names: Sequence[str], *, create: bool) -> int:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for depth, name in enumerate(names, 1):
        try:
            below = _enter(fd, name, "/".join((root, *names[:depth])), create=create)
        finally:
            os.close(fd)
        fd = below
    return fd


def _enter(fd: int, name: str, path: str, *, create: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=fd)
    except FileNotFoundError:
        if not create:
            raise
        with suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=fd)
        return _enter(fd, name, path, create=False)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise FileRefused(f"{path} is {_kind(fd, name)}, not a folder") from error
        raise


def _open_regular(folder: int, path: str, flags: int) -> int:
    name = path.rpartition("/")[2]
    try:
        fd = os.open(name, flags | _FOUND, 0o644, dir_fd=folder)
    except OSError as error:
        # ELOOP a link, EISDIR a folder, ENXIO a FIFO nobody reads or a socket, ENODEV a dead device
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise FileRefused(f"{path} is {_kind(folder, name)}, not a regular file") from error
        raise
    with _closed_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileRefused(f"{path} is {_kind(folder, name)}, not a regular file")
        # The job inherits this open file: it should find an ordinary one.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def _kind(folder: int, name: str) -> str:
    """What stands there now, for a message only."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a regular file",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return "gone"
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def script_path(script_dir: Path, job_id: int, attempt: int) -> Path:
    """Where the script of an attempt lies while it runs."""
    return script_dir / _script_name(job_id, attempt)


def note_start(path: str, pid: int) -> None:
    """Note as which process a script was started."""
    with suppress(OSError):  # then the first process that bears the attempt's tag is taken for it
        _write_note(path, Note(pid))


def note_end(path: Path, pid: int, why: Why) -> None:
    """Note why a script is being ended, before it is. One that has removed its file gets an empty one."""
    with suppress(OSError):  # then a successor has to go by the exit alone
        try:
            _write_note(path, Note(pid, why))
        except FileNotFoundError:
            path.touch(mode=0o700, exist_ok=False)
            _write_note(path, Note(pid, why))


def note_on(path: Path) -> Note | None:
    """What is noted on a script's file; None when that is nothing, or there is none."""
    with suppress(OSError, ValueError):
        why, pid = divmod(int(path.stat(follow_symlinks=False).st_mtime), _PIDS)
        return Note(pid, Why(why) if why else None) if pid else None
    return None


def _write_note(path: str | Path, note: Note) -> None:
    seconds = (note.why or 0) * _PIDS + note.pid
    os.utime(path, (seconds, seconds), follow_symlinks=False)


def _script_name(job_id: int, attempt: int) -> str:
    return f"job-{job_id}.{attempt}"


def scripts_of(script_dir: Path) -> set[Attempt]:
    """The attempts whose scripts lie there."""
    found = (_SCRIPT.fullmatch(path.name) for path in script_dir.iterdir())
    return {Attempt(int(name[1]), int(name[2])) for name in found if name}


class Scripts:
    """The script files of a node, 0700 in `script_dir`.

    The file of a job that has ended is kept, under another name, to become that of a later one: where many files are
    removed, making others costs up to ten times as much on ext4 (bench/README.md).
    """

    def __init__(self, script_dir: Path) -> None:
        self._folder = str(script_dir)
        self._spare: list[str] = []

    def write(self, job_id: int, attempt: int, text: str) -> str:
        """Write a script; answer its path. A file that an earlier worker left there is replaced.

        The folder is made, 0700, where it is missing. Raises FileRefused when other users may write in it, and
        OSError.
        """
        _check_private(self._folder)
        path, data = f"{self._folder}/{_script_name(job_id, attempt)}", text.encode()
        if not self._spare or not _rewrite(self._spare.pop(), path, data):
            with suppress(FileNotFoundError):
                os.unlink(path)
            _write(os.open(path, os.O_WRONLY | _NEW, 0o700), path, data)
        return path

    def remove(self, job_id: int, attempt: int) -> None:
        """Remove the script of an attempt, if it is there."""
        path = f"{self._folder}/{_script_name(job_id, attempt)}"
        with suppress(FileNotFoundError):
            if len(self._spare) == MAX_SPARE:
                os.unlink(path)
                return
            spare = f"{self._folder}/{SPARE}{job_id}.{attempt}"
            os.rename(path, spare)
            self._spare.append(spare)


def _rewrite(spare: str, path: str, data: bytes) -> bool:
    """Let a spare file be the script at `path`; False when it is not ours alone."""
    try:
        fd = os.open(spare, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or stat.S_IMODE(found.st_mode) != 0o700:
        os.close(fd)
        os.unlink(spare)
        return False
    # Never emptied: what is written to a file that was, ext4 sends to the disk at its close.
    _write(fd, spare, data, length=found.st_size)
    os.rename(spare, path)
    return True


def _write(fd: int, path: str, data: bytes, length: int = 0) -> None:
    """Let a file hold `data` instead of `length` bytes, and close it; it is removed when that fails."""
    try:
        at = 0
        while at < len(data):
            at += os.write(fd, data[at:])
        if length > at:
            os.ftruncate(fd, at)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _check_private(script_dir: str) -> None:
    try:
        mode = os.stat(script_dir).st_mode
    except FileNotFoundError:
        os.makedirs(script_dir, mode=0o700, exist_ok=True)
        mode = os.stat(script_dir).st_mode
    # With the sticky bit, as in /tmp, nobody else can replace a file of ours.
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise FileRefused(f"other users may write in {script_dir}: they could replace scripts")


def command_for(script_path: str, script_text: str) -> list[str]:
    """The command that runs a script as the kernel would: interpreter, at most one argument, its path.

    Raises LaunchFailed when the first line names nothing that can be started.
    """
    line = script_text.partition("\n")[0]
    if not line.startswith("#!"):
        raise LaunchFailed("the script does not begin with '#!'")
    if line.endswith("\r"):
        raise LaunchFailed("the script's first line ends in a carriage return: save it with Unix line ends")
    if len(line.encode(errors="surrogatepass")) > MAX_SHEBANG:
        raise LaunchFailed(f"the script's first line is longer than {MAX_SHEBANG} bytes")
    found = _SHEBANG.fullmatch(line)
    if found is None:
        raise LaunchFailed("the script's first line names no interpreter after '#!'")
    interpreter, argument = found.groups()
    _check_interpreter(interpreter)
    return [interpreter, *([argument] if argument else []), script_path]


def _check_interpreter(interpreter: str) -> None:
    if not interpreter.startswith("/") or "\0" in interpreter:
        raise LaunchFailed(f"the script's interpreter {interpreter!r} must be an absolute path")
    if not os.path.isfile(interpreter):
        raise LaunchFailed(f"the script's interpreter {interpreter} does not exist on this node")
    if not os.access(interpreter, os.X_OK):
        raise LaunchFailed(f"the script's interpreter {interpreter} may not be executed")
