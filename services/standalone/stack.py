"""All of Rowlock on one machine: embedded servers where none is configured, and the three roles as processes.

::

    claim(data_dir)  →  free(port)  →  redis, postgres  →  api, scheduler, worker  →  ready
    a stop order     →  api, scheduler, worker (its drain is waited for), redis, postgres
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from pydantic import SecretStr

from core.address import http_address as http_address
from core.db import allocations
from core.db.connection import CONNECTION_ERRORS, connect
from core.errors import RowlockError
from core.settings import Settings, without_secrets
from core.states import State
from services.standalone.child import Child, Step, ending, spawn
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis, make_private

ROLES = ("api", "scheduler", "worker")
SERVERS_FILE = "servers.properties"
FIRST_DELAY, LONGEST_DELAY, STEADY_SECONDS = 1.0, 30.0, 30.0
BAD_SETTINGS = 2  # a role's exit code: starting it again would not help
AVAILABLE = frozenset({"IDLE", "MIXED", "ALLOCATED"})
IMPORT_ROOT = Path(__file__).resolve().parents[2]

Say = Callable[[str], None]


class StackError(RowlockError):
    """The stack cannot run: one line, and the exit code that goes with it."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Orders:
    """What somebody wants of a running stack. The second order to stop is the one in a hurry."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hasten: asyncio.Event = field(default_factory=asyncio.Event)

    def again(self) -> None:
        """One more order to stop."""
        (self.hasten if self.stop.is_set() else self.stop).set()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `output` is the descriptor that roles write to, None for our own stdout and stderr.

    `config` is the settings file that the roles name; what they go by stands in `environment` already.
    """

    settings: Settings
    data_dir: Path
    port: int
    environment: Mapping[str, str]
    embed_postgres: bool
    embed_redis: bool
    roles: tuple[str, ...] = ROLES
    config: Path | None = None
    throwaway: bool = False
    output: int | None = None
    cwd: Path | None = None

    @property
    def address(self) -> str:
        return http_address(self.settings.api_host, self.port)


@dataclass(slots=True)
class _Role:
    name: str
    child: Child | None = None


class Stack:
    """One run of everything in a Plan."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._redis = EmbeddedRedis(plan.data_dir) if plan.embed_redis else None
        self._postgres = EmbeddedPostgres(plan.data_dir, throwaway=plan.throwaway) if plan.embed_postgres else None
        self._roles = tuple(_Role(name) for name in plan.roles)

    async def run(self, orders: Orders, ready: Callable[[], None]) -> None:
        """Start everything, call `ready` once it works, keep it until told to stop, stop it in order."""
        life = asyncio.ensure_future(self._live(ready))
        told = asyncio.ensure_future(orders.stop.wait())
        try:
            await asyncio.wait((life, told), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (life, told):
                task.cancel()
            await asyncio.gather(life, told, return_exceptions=True)
            await self._stop(orders.hasten)
        if not life.cancelled():
            life.result()

    async def _live(self, ready: Callable[[], None]) -> None:
        await self._start_servers()
        try:
            async with asyncio.TaskGroup() as group:
                for server in self._servers():
                    group.create_task(self._keep(server.name, server.wait, server.start))
                for role in self._roles:
                    await self._start_role(role)
                    group.create_task(self._keep_role(role))
                if self._roles:
                    await self._until_ready()
                ready()
        except ExceptionGroup as faults:  # one fault ends the run, and it is told as one
            raise faults.exceptions[0] from None

    def _servers(self) -> "list[EmbeddedRedis | EmbeddedPostgres]":
        return [server for server in (self._redis, self._postgres) if server is not None]

    async def _start_servers(self) -> None:
        settings = self._plan.settings
        if self._redis:
            await self._redis.start()
            self._say(f"Redis: embedded, in {self._plan.data_dir}")
        else:
            self._say(f"Redis: the one configured, {without_secrets(settings.redis_dsn)}")
        if self._postgres:
            await self._postgres.start()
            self._say(f"PostgreSQL: embedded, in {self._plan.data_dir}")
        else:
            self._say(f"PostgreSQL: the one configured, {without_secrets(settings.postgres_dsn)}")
        if self._servers():
            _write_private(self._plan.data_dir / SERVERS_FILE, self._addresses())

    def _addresses(self) -> dict[str, str]:
        """Where the embedded servers are, as settings."""
        urls = {"DATABASE_URL": self._postgres and self._postgres.url, "REDIS_URL": self._redis and self._redis.url}
        return {name: url for name, url in urls.items() if url}

    async def _start_role(self, role: _Role) -> None:
        config = ("--config", str(self._plan.config)) if self._plan.config else ()
        role.child = spawn(
            role.name,
            (*_command(role.name), *config),
            env={**self._plan.environment, **self._addresses()},
            dying=signal.SIGTERM,
            output=self._plan.output,
            cwd=self._plan.cwd,
        )

    async def _keep_role(self, role: _Role) -> None:
        async def wait() -> int:
            assert role.child is not None
            code = await role.child.wait()
            if code == BAD_SETTINGS:
                raise StackError(f"{role.name} refuses its settings", BAD_SETTINGS)
            return code

        await self._keep(role.name, wait, lambda: self._start_role(role))

    async def _keep(self, name: str, wait: Callable[[], Awaitable[int]], start: Callable[[], Awaitable[None]]) -> None:
        delay = FIRST_DELAY
        while True:
            started = time.monotonic()
            code = await wait()
            if time.monotonic() - started >= STEADY_SECONDS:
                delay = FIRST_DELAY
            self._say(f"{name} {ending(code)}; starting it again in {delay:g} s")
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_DELAY)
            await start()

    async def _until_ready(self) -> None:
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(self._plan.address, timeout=timeout) as session:
            said = time.monotonic()
            while (missing := await _missing(session, self._plan.settings.node_name)) is not None:
                if time.monotonic() - said > 30:
                    self._say(f"not ready yet: {missing}")
                    said = time.monotonic()
                await asyncio.sleep(0.05)

    async def _stop(self, hasten: asyncio.Event) -> None:
        for role in self._roles:
            if role.child and role.child.alive:
                self._say(f"stopping {role.name}")
                code = await role.child.stop(self._steps(role.name), hasten)
                if code != 0:
                    self._say(f"{role.name} {ending(code)}")
        if self._roles:
            await self._say_what_runs_on()
        if self._plan.throwaway:
            hasten.set()  # nobody will read what the servers would write now
        for server in self._servers():
            if server.child and server.child.alive:
                self._say(f"stopping {server.name}")
            await server.stop(hasten)
        (self._plan.data_dir / SERVERS_FILE).unlink(missing_ok=True)

    async def _say_what_runs_on(self) -> None:
        """Jobs outlive their worker: say how many there are."""
        settings = self._plan.settings
        if self._postgres:
            settings = settings.model_copy(update={"database_url": SecretStr(self._postgres.url)})
        with contextlib.suppress(*CONNECTION_ERRORS, asyncpg.UndefinedTableError):
            connection = await connect(settings, "up")
            try:
                held = await allocations.of_node(connection, settings.node_name)
            finally:
                connection.terminate()
            if running := sum(job.state is State.RUNNING for job in held):
                self._say(f"running jobs that go on without us: {running}; the next start takes them over")

    def _steps(self, role: str) -> tuple[Step, ...]:
        drain = self._plan.settings.kill_grace_seconds if role == "worker" else 0
        return Step(signal.SIGTERM, drain + 15), Step(signal.SIGTERM, 5)


def _command(role: str) -> tuple[str, ...]:
    """What starts a role; `ps` shows it as `rowlock ROLE` wherever this installation has its script."""
    script = Path(sysconfig.get_path("scripts")) / "rowlock"
    return (sys.executable, str(script), role) if script.is_file() else (sys.executable, "-m", "services.cli", role)


def _write_private(path: Path, values: Mapping[str, str]) -> None:
    """Write KEY=VALUE lines, whole or not at all, for this user alone."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as lines:
        lines.writelines(f"{key}={value}\n" for key, value in values.items())
    fresh.rename(path)


def plan_up(settings: Settings, data_dir: Path, port: int, config: Path | None = None) -> Plan:
    """Embed what is not configured."""
    given = settings.model_fields_set
    # Whoever starts the stack is told once about what is obsolete, not once more by each role.
    inherited = {key: value for key, value in os.environ.items() if key != "WORKER_CONCURRENCY"}
    return Plan(
        settings=settings,
        data_dir=data_dir,
        port=port,
        environment={**inherited, **exported(settings), **_own(data_dir, port)},
        embed_postgres=not given & {"database_url", "postgres_host"},
        embed_redis=not given & {"redis_url", "redis_host"},
        config=config,
    )


def plan_infra(data_dir: Path) -> Plan:
    """Both servers and no role."""
    return Plan(
        settings=Settings.model_construct(),
        data_dir=data_dir,
        port=0,
        environment={},
        embed_postgres=True,
        embed_redis=True,
        roles=(),
    )


def plan_throwaway(settings: Settings, data_dir: Path, port: int, output: int) -> Plan:
    """Embed everything, away from the settings and the directory of whoever looks on."""
    names = {name.upper() for name in Settings.model_fields} | {"WORKER_CONCURRENCY"}
    plain = {key: value for key, value in os.environ.items() if key.upper() not in names}
    return Plan(
        settings=settings,
        data_dir=data_dir,
        port=port,
        environment={**plain, **exported(settings), **_own(data_dir, port)},
        embed_postgres=True,
        embed_redis=True,
        throwaway=True,
        output=output,
        cwd=data_dir,
    )


def _own(data_dir: Path, port: int) -> dict[str, str]:
    # The roles are this very installation, never a `services` package of the current directory.
    here = {"PYTHONPATH": str(IMPORT_ROOT), "PYTHONSAFEPATH": "1"}
    return {**here, "DATA_DIR": str(data_dir), "API_PORT": str(port)}


def exported(settings: Settings) -> dict[str, str]:
    """The settings as an environment that gives the same ones again, wherever they came from."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name.upper(): _text(value) for name, value in values.items() if value not in (None, ())}


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


async def _missing(session: aiohttp.ClientSession, node: str) -> str | None:
    """What is missing yet before jobs can run, in words; None when nothing is."""
    try:
        async with session.get("/health") as answer:
            if answer.status != 200:
                return f"the API says {answer.status}: {(await answer.text())[:200]}"
        async with session.get("/api/v1/nodes") as answer:
            nodes = (await answer.json())["nodes"] if answer.status == 200 else []
    except (aiohttp.ClientError, TimeoutError):
        return "the API does not answer"
    states = {found["name"]: found["state"] for found in nodes}
    return None if states.get(node) in AVAILABLE else f"node {node} is {states.get(node, 'not registered')}"


@contextlib.contextmanager
def claim(data_dir: Path, port: int | None = None, command: str = "rowlock up") -> Iterator[None]:
    """Hold a data directory for one stack; the lock goes with this process, whatever ends it."""
    make_private(data_dir)
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise StackError(f"{data_dir} is in use: {holder or 'a stack is starting or stopping there'}") from None
        os.ftruncate(descriptor, 0)
        place = "" if port is None else f", port {port}"
        os.pwrite(descriptor, f"{command}, pid {os.getpid()}{place}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def check_port(host: str, port: int) -> None:
    """Raise StackError when `port` of `host` is taken, or cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)  # without it two sockets may share an address
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        raise StackError(f"port {port} of {host} {why}; choose another with --port") from None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def obey_signals(orders: Orders, heard: Callable[[signal.Signals], None] = lambda signum: None) -> None:
    """Take Ctrl-C, SIGTERM and a lost terminal as orders to stop."""
    loop = asyncio.get_running_loop()

    def hear(signum: signal.Signals) -> None:
        heard(signum)
        orders.again()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, hear, signum)


def say_line(line: str) -> None:
    """Print a line now. Nobody reading any more is no reason to stop."""
    try:
        print(line, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # so that the flush at exit does not fail either
        os.close(null)
