"""The node: its registration, its lease, and what runs on it now."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import structlog

from core import __version__, crash
from core.cancellation import pause
from core.db import nodes, schema
from core.db.connection import (
    CONNECTION_ERRORS,
    PLANNED_ONCE,
    RETRY_SECONDS,
    Connection,
    Line,
    Pool,
    describe,
    open_pool,
)
from core.errors import NodeNameTaken, SettingsError
from core.moves import Moves
from core.records import Attempt, JobSpec, NodeSpec
from core.settings import Settings
from core.taken import Taken
from core.wakeup import Wakeup
from services.worker import keeper, proc
from services.worker.environment import MARK, Host, read_mark
from services.worker.file_server import FileServer
from services.worker.files import Scripts, Why
from services.worker.launch import describe_host
from services.worker.process import Script
from services.worker.spool import Holder, Spool

POOL_SIZE = 1
COMMAND_SECONDS = 8.0
"""Of the pool: its one connection carries the heartbeats, and twice that, silent, is less than a lease of 30 s."""
LOCK_PAUSE_SECONDS = 0.05
LOCK_PATIENCE_SECONDS = 5
FIRST_TROUBLE_SECONDS = 0.5
# The keeper's turn to end what may be requeued comes after the worker's own, grace period included.
KEEPER_LATER_SECONDS = 2


class Superseded(NodeNameTaken):
    """A newer worker runs as this node: `elsewhere` when with another spool, so that our jobs are not its own."""

    def __init__(self, text: str, *, elsewhere: bool) -> None:
        super().__init__(text)
        self.elsewhere = elsewhere


@dataclass(slots=True, eq=False)
class Run:
    """An attempt that this worker runs: from its start commit to the commit that ends it."""

    spec: JobSpec
    script: Script | None = None
    started: float = 0.0
    """Seconds that it had been running for when this worker began to wait for it."""
    over: bool = False
    """Its script has ended, or was never started: what is left is to report it."""
    cancelled: bool = False
    stopped: bool = False
    fenced: bool = False
    why: Why | None = None
    """Why it is being ended, if it is; perhaps since an earlier worker."""
    lost: str | None = None
    """Why nobody can tell whether it ran, for one that an earlier worker left."""
    may_run_for: float = 0.0
    """Seconds for which a lost one may still run on another machine."""
    _patience: asyncio.Timeout | None = None

    def __post_init__(self) -> None:
        self.cancelled |= self.spec.cancel_requested

    @property
    def attempt(self) -> Attempt:
        """What it is an attempt of."""
        return Attempt(self.spec.job_id, self.spec.attempt)

    def cancel(self) -> None:
        """End it: its cancel is requested."""
        self.cancelled = True
        self._hurry()

    def stop(self) -> None:
        """End it: this worker stops, or must give it up."""
        self.stopped = True
        self._hurry()

    def fence(self) -> None:
        """It is not the current attempt of its job: it ends without a grace period, and nothing is written of it."""
        self.fenced = True
        self.stop()
        if self.script is not None:
            self.script.signal(signal.SIGKILL)

    @asynccontextmanager
    async def patience(self, seconds: float | None) -> AsyncIterator[None]:
        """Raise TimeoutError in the block after so many seconds, or as soon as it is to end."""
        try:
            async with asyncio.timeout(0 if self.cancelled or self.stopped else seconds) as self._patience:
                yield
        finally:
            self._patience = None

    def _hurry(self) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(0)


Begin = Callable[[Run], None]
"""Enters a run among the node's runs, and sees it to its end."""


@dataclass(slots=True)
class Node:
    """What the duties of a worker share."""

    settings: Settings
    pool: Pool
    line: Line
    """For what may start something, under `claiming`."""
    host: Host
    spool: Spool
    scripts: Scripts
    incarnation: int
    heard: float
    """When the last heartbeat that PostgreSQL answered was sent, by `proc.now`."""
    roots: tuple[Path, ...]
    """The folders under which jobs may work and write."""
    kept_since: int
    """The first incarnation of those in a row whose scripts this worker's keeper has seen end, if they did."""
    moves: Moves = field(default_factory=lambda: Moves(wanted=lambda: False))
    """What is told of its jobs to whoever waits for them."""
    taken: Taken = field(default_factory=Taken)
    """What it has allocated by itself, and the scheduler is told of."""
    runs: dict[Attempt, Run] = field(default_factory=dict)
    # A start and a look at the tables never overlap: a look taken before a start's commit knows nothing of it.
    claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    recovered: bool = False
    """Whether it is found out what an earlier worker left: nothing new starts before."""
    draining: bool = False
    trouble: str | None = "not looked at yet"
    """Why this node cannot start anything now, such as a full disk."""
    trouble_until: float = 0.0
    """Till when it stays in trouble at least, by the loop's clock."""
    trouble_seconds: float = FIRST_TROUBLE_SECONDS
    stale_writes_refused: int = 0
    """Ends of attempts that were not the current ones any more."""
    look: Wakeup = field(default_factory=Wakeup)
    beat: Wakeup = field(default_factory=Wakeup)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The node's name."""
        return self.settings.node_name

    def tag(self, attempt: Attempt | JobSpec) -> int:
        """What the processes of an attempt bear."""
        return proc.tag_of(attempt.job_id, attempt.attempt, self.host.spool_id)

    @property
    def is_silent(self) -> bool:
        """Whether PostgreSQL has answered no heartbeat for as long as a lease lasts: then nothing starts here.

        What did would be ended at once where it may be requeued (health.py), though the lease itself may have been
        prolonged by a heartbeat whose answer was lost.
        """
        return proc.now() - self.heard > self.settings.lease_seconds

    def hear(self, asked: float) -> None:
        """PostgreSQL has answered a heartbeat that was sent at `asked`: from then on silence counts anew."""
        if self.is_silent:
            self.look.set()  # for what was not started meanwhile
        self.heard = asked
        settings = self.settings
        with suppress(OSError):  # then the keeper ends what may be requeued, and nothing else goes wrong
            self.spool.end_silence(asked + settings.requeue_after + settings.kill_grace_seconds + KEEPER_LATER_SECONDS)

    def end(self, run: Run) -> None:
        """The end of a run is committed, or was refused."""
        if run.spec.requeue:
            with suppress(OSError):
                self.spool.end_grant(self.tag(run.spec))
        del self.runs[run.attempt]
        self.changed.set()


async def join(settings: Settings, spool: Spool, identity: str, stack: AsyncExitStack) -> Node:
    """Become the node's worker; what is opened for that is closed with `stack`. Raises NodeNameTaken, SettingsError."""
    check_spool(spool, settings.node_name)
    pool = await open_pool(settings, "worker", POOL_SIZE, COMMAND_SECONDS, **PLANNED_ONCE)
    stack.callback(pool.terminate)
    await schema.ensure(pool)
    host, secret = describe_host(settings, identity), secrets.token_urlsafe(32)
    runs: dict[Attempt, Run] = {}
    server = FileServer(settings, host, pool, secret, runs)
    stack.push_async_callback(server.stop)
    spec = describe_node(settings, host, await server.start(), secret)
    incarnation, asked = await register(pool, spec, settings)
    crash.here("worker.registered")
    patience = 2 * settings.heartbeat_seconds + LOCK_PATIENCE_SECONDS
    kept_since = await hold_spool(spool, settings.node_name, incarnation, patience)
    line = Line(settings, "worker", **PLANNED_ONCE)
    stack.callback(line.close)
    scripts = Scripts(spool.script_dir)
    node = Node(settings, pool, line, host, spool, scripts, incarnation, asked, settings.roots, kept_since, runs=runs)
    node.hear(asked)
    return node


def describe_node(settings: Settings, host: Host, address: str, secret: str) -> NodeSpec:
    """What this worker registers."""
    return NodeSpec(
        name=settings.node_name,
        partitions=settings.partitions,
        cpus=settings.total_cpus,
        memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        work_base_dir=str(settings.work_base_dir),
        job_user=host.user,
        spool_id=host.spool_id,
        hostname=host.hostname,
        address=address,
        secret=secret,
        version=__version__,
        grace_seconds=settings.kill_grace_seconds,
        requeue_after_seconds=settings.requeue_after,
    )


def check_spool(spool: Spool, node: str) -> Holder | None:
    """Answer the worker that is at work in this spool, if one is.

    Raises SettingsError when it is another node's, or scripts of another node lie here: whatever of them runs on
    would be taken for stale.
    """
    holder = spool.holder()
    if holder is not None and holder.node != node:
        raise SettingsError(
            f"SCRIPT_DIR={spool.script_dir} is in use by the worker of node {holder.node}: each node needs a SCRIPT_DIR"
            f" (or a DATA_DIR) of its own; NODE_NAME={node}"
        )
    if (other := spool.node_of_scripts()) not in (None, node):
        raise SettingsError(
            f"SCRIPT_DIR={spool.script_dir} holds scripts of node {other}, which may still run: NODE_NAME={node} needs"
            f" a SCRIPT_DIR (or a DATA_DIR) of its own, or should be {other}"
        )
    return holder


async def hold_spool(spool: Spool, node: str, incarnation: int, patience: float) -> int:
    """Be the only worker of this spool for as long as this process lives: only its end gives the lock back.

    An older worker stops by itself once it hears of its successor. One that does not, frozen perhaps, is killed:
    until it is gone nobody can tell whether it starts something. Its jobs go on, under its keeper, which is told
    not to start it again. Answers since which incarnation this worker's keeper has kept them all.
    Raises SettingsError as `check_spool` does: another node's worker may have come first, since that was asked.
    """
    deadline = asyncio.get_running_loop().time() + patience
    while (since := spool.lock(node, keeper.pid(), incarnation)) is None:
        holder = check_spool(spool, node)
        if holder is not None and asyncio.get_running_loop().time() > deadline:
            structlog.get_logger().warning("older_worker_killed", pid=holder.pid)
            spool.kill(holder)
        await asyncio.sleep(LOCK_PAUSE_SECONDS)
    return since


async def register(pool: Pool, spec: NodeSpec, settings: Settings) -> tuple[int, float]:
    """Register the node, waiting for PostgreSQL as long as it takes. Raises NodeNameTaken and SettingsError.

    Answers the incarnation, and when it was asked for, by `proc.now`.
    """
    log, said = structlog.get_logger(), ""
    while True:
        asked = proc.now()
        try:
            async with pool.acquire() as connection:
                await check_processes(connection, spec)
                async with connection.transaction():
                    incarnation = await nodes.register(connection, spec, settings.lease_seconds)
                    holder = None if incarnation is not None else await nodes.holder(connection, spec.name)
        except (asyncpg.ForeignKeyViolationError, *CONNECTION_ERRORS) as error:  # the first: forgotten at this moment
            if (problem := describe(error)) != said:
                log.warning("registration_waits", error=problem)
                said = problem
            await pause(RETRY_SECONDS)
            continue
        if incarnation is None:
            raise NodeNameTaken(
                f"NODE_NAME={spec.name} is held by a worker on {holder.hostname if holder else 'another host'}: give"
                f" this worker a name of its own, or wait until that one's lease is over"
            )
        log.info("node_registered", node=spec.name, cpus=spec.cpus, incarnation=incarnation)
        return incarnation, asked


async def check_processes(connection: Connection, spec: NodeSpec) -> None:
    """Raise SettingsError while jobs of this node run on this very machine that another spool has started.

    Of them this worker would know nothing: it would call them lost, and give their CPUs to others. Also of those that
    the tables call over, since the node was silent for too long: only a worker of that spool ends what is left of them.
    """
    before = await nodes.holder(connection, spec.name)
    if before is None or before.spool_id == spec.spool_id:
        return
    for pid in proc.all_pids():
        if (named := read_mark(proc.read_variable(pid, MARK))) is not None and named[2] == before.spool_id:
            raise SettingsError(
                f"NODE_NAME={spec.name}: job {named[0]} of this node runs here (process {pid}) and belongs to another"
                " SCRIPT_DIR (or DATA_DIR): start the worker with that one, or wait until it has ended"
            )


async def heartbeat_once(node: Node) -> int:
    """Prolong the lease, or raise Superseded when a newer worker holds it, or nobody: the node was forgotten."""
    asked = proc.now()
    async with node.pool.acquire() as connection:
        current = await nodes.heartbeat(
            connection,
            node.name,
            node.incarnation,
            lease_seconds=node.settings.lease_seconds,
            draining=node.draining,
            cpu_load=os.getloadavg()[0],
            stale_writes_refused=node.stale_writes_refused,
        )
        holder = None if current else await nodes.holder(connection, node.name)
    if not current and holder is None:
        raise Superseded(
            f"node {node.name} was deleted: this worker stops; start it again to register the node anew", elsewhere=True
        )
    if not current:
        elsewhere = holder is not None and holder.spool_id != node.host.spool_id
        raise Superseded(f"a newer worker runs as node {node.name}: this one stops", elsewhere=elsewhere)
    node.hear(asked)
    return 0
