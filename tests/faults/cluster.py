"""A whole Rowlock for a run: servers of its own, every role a real process, and a wire of its own to each server.

Who is killed is started again, as a service manager would: what a role cannot survive by itself is a finding.
"""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import time
from typing import Any, Literal
from uuid import uuid4

import asyncpg
from pydantic import SecretStr
from redis.asyncio import Redis

from core.client import Client
from core.settings import Settings
from services.standalone.child import Child, Step, ending, spawn
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis
from services.standalone.stack import free_port
from services.worker import proc
from services.worker.keeper import EXIT_REPLACED, EXIT_SETTINGS
from tests.faults.evidence import Loss
from tests.faults.jobs import GRACE_SECONDS
from tests.faults.wires import Wires
from tests.proxy import Proxy
from tests.system import System, alive_with, cmdline, until

Kind = Literal["api", "scheduler", "worker"]

SERVERS = "servers"
"""The folder, in that of a run, of its PostgreSQL and Redis; a cluster that is there already is used."""
DISK_BYTES = 4 * 1024 * 1024
POSTGRES_OPTIONS = {"max_connections": "200", "checkpoint_timeout": "30s"}
QUICK: dict[str, Any] = {
    "heartbeat_seconds": 0.4,
    "lease_seconds": 3.0,
    "requeue_after": 8.0,
    "poll_seconds": 0.5,
    "kill_grace_seconds": GRACE_SECONDS,
}
"""Settings under which what takes minutes takes seconds."""


@dataclass(slots=True, eq=False)
class Role:
    """One instance of a role, by a name that stays, over all its processes."""

    kind: Kind
    name: str
    postgres: Wires
    redis: Proxy
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Words before its command."""
    child: Child | None = None
    kept: bool = True
    """Whether it is started again when it ends."""
    struck: bool = False
    """Whether its next end is of our making."""
    address: str = ""
    """Of an API."""

    @property
    def node(self) -> str:
        """Of a worker: its node."""
        return self.environment["NODE_NAME"]

    @property
    def pid(self) -> int:
        """Of the process that was started, dead or alive; of a worker, its launcher."""
        assert self.child is not None
        return self.child.pid


@dataclass(frozen=True, slots=True)
class Disk:
    """A small disk, in a mount namespace that a process of ours keeps."""

    folder: Path
    keeper: Child

    @property
    def entering(self) -> tuple[str, ...]:
        """The words before a command that is to see it."""
        return (*words_for("nsenter", f"--target={self.keeper.pid}"), "--mount")

    def seen(self, path: Path) -> Path:
        """A path of that namespace, where this process can use it."""
        return Path(f"/proc/{self.keeper.pid}/root") / path.relative_to("/")


def words_for(command: str, *arguments: str) -> tuple[str, ...]:
    """Whoever is not root is so in a user namespace of its own."""
    mine = {"unshare": ("--user", "--map-root-user"), "nsenter": ("--user", "--preserve-credentials")}
    return (shutil.which(command) or command, *arguments, *(() if os.geteuid() == 0 else mine[command]))


async def small_disk(folder: Path) -> Disk:
    """Mount one on a folder; ChildProcessError where that is not allowed."""
    mount = (
        f"mount -t tmpfs -o size={DISK_BYTES},mode=700 tmpfs {folder} && touch {folder}/ready && exec sleep infinity"
    )
    child = spawn(
        "disk",
        (*words_for("unshare"), "--mount", "/bin/sh", "-c", mount),
        env={"PATH": os.environ["PATH"]},
        dying=signal.SIGKILL,
    )
    disk = Disk(folder, child)
    while not disk.seen(folder / "ready").exists():
        if not child.alive:
            raise ChildProcessError("no disk can be mounted")
        await asyncio.sleep(0.01)
    return disk


@dataclass(slots=True)
class Cluster:
    """One run's servers and roles. Made by `cluster`."""

    folder: Path
    system: System
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis
    nodes: dict[str, int]
    broken: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Roles that ended and were not struck."""
    restarts: tuple[float, float] = (0.0, 0.0)
    """Seconds, from and to, after which a role that ended is started again."""
    luck: Random = field(default_factory=Random)
    token: str = field(default_factory=lambda: uuid4().hex[:8])
    """In the name of every job: what it leaves behind is known by it."""
    keepers: list[asyncio.Task[None]] = field(default_factory=list)
    contested: dict[str, float] = field(default_factory=dict)
    """Until when a worker of a node may be refused because another spool's was there."""
    servers: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One fault at a time happens to the servers."""

    @property
    def ledger(self) -> Path:
        """Where the scripts write."""
        return self.folder / "ledger"

    def of(self, kind: Kind) -> list[Role]:
        """Every instance of a role."""
        return [role for role in self.roles.values() if role.kind == kind]

    def of_node(self, node: str) -> list[Role]:
        """The workers of a node: one, or two while one replaces the other."""
        return [role for role in self.of("worker") if role.node == node]

    async def add(
        self, kind: Kind, name: str, *arguments: str, before: tuple[str, ...] = (), **environment: str | int
    ) -> Role:
        """Make a role with wires of its own, start it, and keep it."""
        postgres, redis = Wires(self.postgres.url), Proxy(self.redis.url)
        await postgres.mend()
        await redis.mend()
        own = {
            "DATABASE_URL": postgres.url,
            "REDIS_URL": redis.url,
            "LOG_DIR": str(self.folder / "logs" / name),
            **{key: str(value) for key, value in environment.items()},
        }
        role = Role(kind, name, postgres, redis, self.system.environment(**own), arguments, before)
        if kind == "api":
            role.address = f"http://127.0.0.1:{own['API_PORT']}"
        self.roles[name] = role
        self.start(role)
        self.keepers.append(asyncio.create_task(self._keep(role)))
        return role

    async def add_worker(self, name: str, node: str, folder: str = "", **environment: str | int) -> Role:
        """A worker of a node; its spool lies in the folder of that name, which is the node's by default."""
        disk = self.disks.get(node)
        return await self.add(
            "worker",
            name,
            before=disk.entering if disk else (),
            NODE_NAME=node,
            TOTAL_CPUS=self.nodes[node],
            DATA_DIR=str(self.folder / (folder or node)),
            **environment,
        )

    async def make_disk(self, node: str) -> None:
        """Give a node a small disk of its own, below its folder, that only its workers see."""
        (self.folder / node).mkdir()
        self.disks[node] = await small_disk(self.folder / node)

    def spool_of(self, role: Role) -> Path:
        """A worker's DATA_DIR, where this process can read it."""
        data = Path(role.environment["DATA_DIR"])
        disk = self.disks.get(role.node)
        return data if disk is None else disk.seen(data)

    def start(self, role: Role) -> None:
        """Start its process."""
        module = ("-m", "tests.faults.broken", self.broken) if self.broken else ("-m",)
        with (self.folder / f"{role.name}.err").open("ab") as err:
            role.child = spawn(
                role.name,
                (*role.before, sys.executable, *module, f"services.{role.kind}", *role.arguments),
                env=role.environment,
                dying=signal.SIGTERM,
                output=err.fileno(),
                cwd=self.folder,
            )
        role.struck = "ROWLOCK_CRASH" in role.environment  # then it ends itself

    async def _keep(self, role: Role) -> None:
        while True:
            assert role.child is not None
            child = role.child
            code = await child.wait()
            if not role.struck and not (role.kind == "worker" and self._may_be_refused(role, code)):
                self.surprises.append(f"{role.name} {ending(code)}")
            if not role.kept:
                return
            await asyncio.sleep(self.luck.uniform(*self.restarts))
            if role.child is child:
                self.start(role)

    def _may_be_refused(self, role: Role, code: int) -> bool:
        """Whether another worker of its node may be why it has ended so."""
        return code == EXIT_REPLACED or (code == EXIT_SETTINGS and now() < self.contested.get(role.node, 0))

    def kill(self, role: Role) -> None:
        """End its process at once; of a worker, see `worker_pid`."""
        assert role.child is not None
        role.struck = True
        role.child.process.kill()

    async def retire(self, role: Role, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it politely, and do not start it again."""
        assert role.child is not None
        role.kept, role.struck = False, True
        if role.child.alive:
            role.child.process.send_signal(number)
        await role.child.stop((Step(number, 60),))
        self.roles.pop(role.name, None)
        await role.postgres.close()
        await role.redis.close()

    def keeper_pids(self, role: Role) -> list[int]:
        """The keepers below a worker's launcher; there is none for a moment after it was killed."""
        return [pid for pid in proc.children(role.pid) if not _is_dead(pid)]

    def worker_pid(self, role: Role) -> int | None:
        """The asyncio worker below a launcher and its keeper, if one lives at this moment."""
        for keeper in self.keeper_pids(role):
            for pid in proc.children(keeper):
                if "services.worker.kept" in cmdline(pid) and not _is_dead(pid):
                    return pid
        return None

    def scripts_of(self, role: Role) -> list[int]:
        """The scripts of a worker's node that live at this moment: session leaders that say so in their environment."""
        mark = f"SLURMD_NODENAME={role.node}\0".encode()
        found = []
        for pid in proc.all_pids():
            stat = proc.read_stat(pid)
            if stat is None or stat.dead or stat.session != pid:
                continue
            with suppress(OSError):
                text = Path(f"/proc/{pid}/environ").read_bytes()
                if mark in text and str(self.ledger).encode() in text:
                    found.append(pid)
        return found

    async def connect(self) -> asyncpg.Connection:
        """A look into the database, past the wires."""
        return await asyncpg.connect(self.postgres.url, timeout=5, command_timeout=30)

    def redis_client(self) -> Redis:
        """Redis, past the wires."""
        return Redis.from_url(self.redis.url, socket_timeout=5)

    async def ready(self) -> None:
        """Every role there and at work: APIs well, nodes alive."""
        for role in self.of("api"):
            async with Client(role.address) as client:
                await self.system.healthy(client)
        async with Client(self.of("api")[0].address) as client:
            self.system.client = client
            for node in {role.node for role in self.of("worker")}:
                await self.system.node_is(node)

    async def mend(self) -> None:
        """Undo whatever lasts: silent wires, frozen processes."""
        for role in self.roles.values():
            await role.postgres.mend()
            await role.redis.mend()
            for pid in (role.pid, *((self.worker_pid(role),) if role.kind == "worker" else ())):
                if pid is not None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    async def crash_postgres(self, how: Literal["kill", "immediate", "backend"]) -> None:
        """End PostgreSQL as a crash does, and let it recover."""
        assert self.postgres.child is not None
        child = self.postgres.child
        backends = proc.children(child.pid)
        if how == "backend":  # the server ends all of its others then, and recovers by itself
            await self._kill_one_backend()
            return
        if how == "kill":
            for pid in (child.pid, *backends):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            child.process.send_signal(signal.SIGQUIT)
        await child.wait()
        await self.postgres.start()

    async def _kill_one_backend(self) -> None:
        connection = await self.connect()
        try:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            os.kill(pid, signal.SIGKILL)
        finally:
            connection.terminate()

        async def answers() -> bool:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InternalClientError):
                await (await self.connect()).close()
                return True
            return False

        await until(answers, "PostgreSQL recovers")

    async def restart_redis(self, old: bytes | None = None) -> None:
        """Kill Redis and start it again with the snapshot that it has, or with an `old` one; empty: with none."""
        assert self.redis.child is not None
        self.redis.child.process.kill()
        await self.redis.child.wait()
        snapshot = self.redis.data_dir / "redis" / "dump.rdb"
        if old is not None:
            snapshot.unlink(missing_ok=True)
            if old:
                snapshot.write_bytes(old)
        await self.redis.start()

    async def close(self) -> None:
        """End everything, whatever state it is in."""
        for task in self.keepers:
            task.cancel()
        await asyncio.gather(*self.keepers, return_exceptions=True)
        for role in self.roles.values():
            await role.postgres.close()
            await role.redis.close()
        for disk in self.disks.values():
            disk.keeper.process.kill()
        while left := self._left():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for child in self._children():
                child.process.poll()  # or it would stay, dead
            await asyncio.sleep(0.01)
        for child in self._children():
            await child.wait()

    def _children(self) -> list[Child]:
        roles = [role.child for role in self.roles.values() if role.child is not None]
        return [*roles, *(disk.keeper for disk in self.disks.values())]

    def _left(self) -> set[int]:
        """Everything of this run that lives, but for its servers."""
        servers = {child.pid for child in (self.postgres.child, self.redis.child) if child is not None}
        found = {*alive_with(str(self.folder)), *alive_with(self.token)}
        return {pid for pid in found if pid not in servers and not servers & {(proc.read_stat(pid) or _GONE).parent}}


_GONE = proc.Stat("X", 0, 0, 0, 0, 0)


def _is_dead(pid: int) -> bool:
    stat = proc.read_stat(pid)
    return stat is None or stat.dead


def now() -> float:
    """Seconds since the epoch, as the scripts and the database know them."""
    return time()


@asynccontextmanager
async def cluster(
    folder: Path,
    *,
    nodes: Mapping[str, int],
    apis: int = 2,
    schedulers: int = 2,
    broken: str | None = None,
    options: Mapping[str, str] | None = None,
    small: Sequence[str] = (),
    **changes: Any,
) -> AsyncIterator[Cluster]:
    """A cluster that is ready, until the end of the block.

    `changes` are settings, `options` those of PostgreSQL, `broken` is a defect (broken.py), `small` are nodes with a
    small disk of their own.
    """
    settings = Settings.model_construct().model_copy(
        update={**QUICK, "data_dir": folder / "data", "log_dir": folder / "logs", "api_port": 0, **changes}
    )
    servers = folder / SERVERS
    async with (
        EmbeddedRedis(servers) as redis,
        EmbeddedPostgres(servers, throwaway=True, options={**POSTGRES_OPTIONS, **(options or {})}) as postgres,
    ):
        settings = settings.model_copy(
            update={"database_url": SecretStr(postgres.url), "redis_url": SecretStr(redis.url)}
        )
        found = Cluster(folder, System(settings, folder), postgres, redis, dict(nodes), broken)
        try:
            for number in range(apis):
                await found.add("api", f"api-{number}", API_PORT=free_port())
            for number in range(schedulers):
                await found.add("scheduler", f"scheduler-{number}")
            for node in small:
                await found.make_disk(node)
            for node in nodes:
                await found.add_worker(f"worker-{node}", node)
            await found.ready()
            yield found
        finally:
            await found.close()
