"""Every kind of fault: a function that strikes a run once and says what it met.

A fault counts when it met work: a job that was starting, running or ending on that role at that instant. How that
is judged stands with each kind; what is read for it is read right before the blow.
"""

import asyncio
import errno
import functools
import glob
import math
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from core import streams
from core.records import Attempt
from services.worker import proc
from services.worker.spool import Spool
from tests.faults import ledger
from tests.faults.cluster import Cluster, Role, now, words_for
from tests.faults.evidence import Loss, Silence
from tests.faults.record import Struck
from tests.faults.run import Run
from tests.faults.wires import WRITES
from tests.system import ROOT

Strike = Callable[[Run], Awaitable[Struck | None]]

TRIES = 400
TRY_SECONDS = 0.005
REFUSED_SECONDS = 5.0
"""Until who was refused at the last moment has ended."""
SLACK_SECONDS = 0.3
"""A lease is over at some time after its node fell silent; a look at what happened then begins so much later."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: what the table calls it, how often it strikes in a long run, and why it cannot, if it cannot."""

    name: str
    every: float
    strike: Strike
    impossible: Callable[[], str | None] = lambda: None


KINDS: dict[str, Kind] = {}


def kind(name: str, every: float, impossible: Callable[[], str | None] = lambda: None) -> Callable[[Strike], Strike]:
    """Enter a function among the kinds; `every` so many seconds it strikes in a long run."""

    def enter(strike: Strike) -> Strike:
        KINDS[name] = Kind(name, every, strike, impossible)
        return strike

    return enter


def _one_of(run: Run, roles: list[Role]) -> Role:
    return run.luck.choice(sorted(roles, key=lambda role: role.name))


def _a_worker(run: Run) -> Role:
    """One that nobody replaces at this moment."""
    workers = run.cluster.of("worker")
    return _one_of(run, [role for role in workers if role.kept] or workers)


async def _a_moment(run: Run) -> None:
    """Some instant: as often any, as right after a client has asked for something."""
    if run.luck.random() < 0.5:
        await asyncio.sleep(run.luck.uniform(0, 0.3))
        return
    run.load.asked.clear()
    with suppress(TimeoutError):
        await asyncio.wait_for(run.load.asked.wait(), 2)
    await asyncio.sleep(run.luck.uniform(0, 0.03))


async def _on_node(run: Run, role: Role) -> dict[str, int]:
    """What a worker has to do with: the attempts placed on its node, by state; scripts alive while nobody can tell."""
    states = await run.states(role.node)
    return states or {"scripts": len(run.cluster.scripts_of(role))}


async def _is_heard(run: Run, role: Role) -> bool:
    """Whether its node's lease lasts."""
    return bool(await run.ask("SELECT FROM node_leases WHERE node = $1 AND lease_until > now()", role.node))


# The roles, killed


@kind("worker killed (-9)", 3.2)
async def kill_worker(run: Run) -> Struck | None:
    """Met: the attempts that are CONFIGURING or RUNNING on its node.

    Not before it was heard since the last time: its keeper waits longer each time, and a node that is silent for long
    enough is lost for good reasons.
    """
    role = _a_worker(run)
    await _a_moment(run)
    met = await _on_node(run, role)
    pid = run.cluster.worker_pid(role)
    if pid is None or not await _is_heard(run, role):
        return None
    os.kill(pid, signal.SIGKILL)
    return Struck("worker killed (-9)", role.name, met)


@kind("scheduler killed (-9)", 9)
async def kill_scheduler(run: Run) -> Struck | None:
    """Met: the jobs that wait, or are placed and not started. The leader, mostly."""
    leader = await leader_of(run.cluster)
    role = leader if leader is not None and run.luck.random() < 0.8 else _one_of(run, run.cluster.of("scheduler"))
    await _a_moment(run)
    states = await run.states()
    met = {state: states.get(state, 0) for state in ("PENDING", "CONFIGURING")} if role is leader else {}
    run.cluster.kill(role)
    return Struck("scheduler killed (-9)", role.name, met)


async def leader_of(cluster: Cluster) -> Role | None:
    """The scheduler that leads, as far as its log knows."""
    for role in cluster.of("scheduler"):
        text = await asyncio.to_thread((cluster.folder / f"{role.name}.err").read_bytes)  # all: it may lead for long
        told = [text.rfind(event) for event in (b'"scheduler_leads"', b'"leader_connection_lost"', b'"role_starting"')]
        if told[0] > max(told[1:]):
            return role
    return None


@kind("API killed (-9)", 9)
async def kill_api(run: Run) -> Struck | None:
    """Met: the requests that wait for its answer; struck while there is one."""
    role = _one_of(run, run.cluster.of("api"))
    for _ in range(TRIES):
        run.load.asked.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(run.load.asked.wait(), 2)
        await asyncio.sleep(run.luck.choice((0, 0.001, 0.003, 0.006, 0.01)))
        if run.load.in_flight[role.name]:
            break
    met = {"requests": run.load.in_flight[role.name]}
    run.cluster.kill(role)
    return Struck("API killed (-9)", role.name, met)


@kind("keeper killed (-9)", 60)
async def kill_keeper(run: Run) -> Struck | None:
    """Met: the attempts on its worker's node. The launcher ends with it, and is started again.

    What an earlier worker had left to it has then lost both of its parents, and may be lost.
    """
    role = _a_worker(run)
    met = await _on_node(run, role)
    keepers = run.cluster.keeper_pids(role)
    if not keepers or _is_armed(role):
        return None
    role.struck = True
    began = now()
    kept = await _may_be_lost(run, role, keepers)
    for pid in keepers:
        os.kill(pid, signal.SIGKILL)
    run.cluster.losses.append(Loss(role.node, began, now(), kept))
    return Struck("keeper killed (-9)", role.name, met)


async def _may_be_lost(run: Run, role: Role, keepers: Sequence[int] = ()) -> frozenset[Attempt] | None:
    """What a node may lose with these keepers; None, whatever it runs, while the database cannot be asked."""
    if not await run.ask("SELECT 1"):
        return None
    return await _kept_by(run, role, keepers) | await _unstarted(run, role)


async def _unstarted(run: Run, role: Role) -> frozenset[Attempt]:
    """What is RUNNING on a node and has not spoken: its worker may have died before it was started.

    Only that worker's own keeper can tell so; without it, it may have run.
    """
    rows = await run.ask("SELECT job_id, attempt FROM jobs WHERE node = $1 AND state = 'RUNNING'", role.node)
    started = {line.attempt for line in ledger.read(run.cluster.ledger) if line.word == "start"}
    return frozenset(Attempt(*row) for row in rows) - started


async def _kept_by(run: Run, role: Role, keepers: Sequence[int]) -> frozenset[Attempt]:
    """The attempts whose scripts, dead or alive, are children of a keeper's own."""
    rows = await run.ask("SELECT job_id, attempt FROM allocations WHERE node = $1", role.node)
    spool = Spool(run.cluster.spool_of(role) / "scripts").open()
    tags = {proc.tag_of(job_id, attempt, spool): Attempt(job_id, attempt) for job_id, attempt in rows}
    children = {proc.read_tag(child) for keeper in keepers for child in proc.children(keeper)}
    return frozenset(attempt for tag, attempt in tags.items() if tag in children)


@kind("keeper and worker killed (-9)", 75)
async def kill_keeper_and_worker(run: Run) -> Struck | None:
    """Met: the attempts on the node, which may be lost by it."""
    role = _a_worker(run)
    met = await _on_node(run, role)
    return Struck("keeper and worker killed (-9)", role.name, met) if kill_both(run, role) else None


def _is_armed(role: Role) -> bool:
    """Whether its workers end themselves at a point: without a keeper that would lose jobs, nobody knows when."""
    return "ROWLOCK_CRASH" in role.environment


def kill_both(run: Run, role: Role) -> bool:
    """Kill a worker and its keeper, which are started again; False while one of them is not there."""
    keepers, worker = run.cluster.keeper_pids(role), run.cluster.worker_pid(role)
    if not keepers or worker is None or _is_armed(role):
        return False
    role.struck = True
    began = now()
    for pid in (*keepers, worker):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.cluster.losses.append(Loss(role.node, began, now()))
    return True


# The roles, killed between two effects

POINTS = sorted(
    {
        point
        for path in (*(ROOT / "core").rglob("*.py"), *(ROOT / "services").rglob("*.py"))
        for point in re.findall(r'crash\.here\("(.+?)"\)', path.read_text(encoding="utf-8"))
    }
)
"""The points of the product at which it can be made to end (core/crash.py), by role and what was done there."""

POINT_SECONDS = 10.0
KILLED = b"was killed by signal 9"


def _at_a_point(name: str, every: float, role_kind: str) -> None:
    @kind(name, every)
    async def crash(run: Run) -> Struck | None:
        """Met: the job, or the jobs of the node, that came to the point."""
        point = run.luck.choice([point for point in POINTS if point.startswith(role_kind)])
        return await crash_at(run, point, run.luck.choice((1, 1, 2, 5)))


_at_a_point("worker killed at a named point", 40, "worker")
_at_a_point("scheduler killed at a named point", 60, "scheduler")
_at_a_point("API killed at a named point", 60, "api")


async def crash_at(run: Run, point: str, passing: int = 1) -> Struck | None:
    """Let a role end itself at a point; None when it did not come there."""
    kind = point.partition(".")[0]
    how = f"{point}:{passing}"
    return await (_crash_worker(run, how) if kind == "worker" else _crash(run, kind, how))


async def _crash_worker(run: Run, how: str) -> Struck | None:
    """Its keeper starts it again, and there it ends again, until it is stopped and another one started."""
    role = await _replaced(run, _a_worker(run), ROWLOCK_CRASH=how)
    if role is None:
        return None
    said = run.cluster.folder / f"{role.name}.err"
    await _within(POINT_SECONDS, lambda: KILLED in said.read_bytes())
    deaths = said.read_bytes().count(KILLED)
    met = await _on_node(run, role)
    if not role.kept:  # somebody else replaces it
        return Struck("worker killed at a named point", role.name, met, how) if deaths else None
    role.kept = False
    run.cluster.losses.append(Loss(role.node, now(), now(), await _may_be_lost(run, role)))
    await run.cluster.retire(role)
    run.replaced += 1
    await run.cluster.add_worker(f"worker-{role.node}-{run.replaced}", role.node)
    return Struck("worker killed at a named point", role.name, met, how) if deaths else None


async def _crash(run: Run, kind: str, how: str) -> Struck | None:
    """The next of its processes ends there, and the one after it does not. Of schedulers it is the one that leads."""
    roles = run.cluster.of(kind)  # type: ignore[arg-type]
    armed = roles if kind == "scheduler" else [_one_of(run, roles)]
    before = {role.name: role.child for role in armed}
    for role in armed:
        role.environment["ROWLOCK_CRASH"] = how
        run.cluster.kill(role)
    await _within(POINT_SECONDS, lambda: all(role.child is not before[role.name] for role in armed))
    children = [role.child for role in armed if role.child is not None]
    for role in armed:
        del role.environment["ROWLOCK_CRASH"]
        role.struck = True
    await _within(POINT_SECONDS, lambda: not all(child.alive for child in children))
    ended = [child.name for child in children if not child.alive]
    for role in armed:
        if role.child in children and role.name not in ended:
            run.cluster.kill(role)
    return (
        Struck(f"{'API' if kind == 'api' else kind} killed at a named point", ended[0], {"jobs": 1}, how)
        if ended
        else None
    )


async def _within(seconds: float, true: Callable[[], bool]) -> None:
    """Wait until it is so, and no longer."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.02)


# The roles, stopped and frozen


@kind("worker stopped (SIGTERM), started again", 45)
async def stop_worker(run: Run) -> Struck | None:
    """Met: the attempts on its node."""
    role = _a_worker(run)
    met = await _on_node(run, role)
    assert role.child is not None
    if role.struck or not role.child.alive:
        return None
    role.struck = True
    run.cluster.losses.append(Loss(role.node, now(), now(), await _may_be_lost(run, role)))
    role.child.process.send_signal(signal.SIGTERM)
    return Struck("worker stopped (SIGTERM), started again", role.name, met)


@kind("worker replaced while it runs", 75)
async def replace_worker(run: Run) -> Struck | None:
    """Met: the attempts on its node, which the newer worker takes over."""
    old = _a_worker(run)
    met = await _on_node(run, old)
    return Struck("worker replaced while it runs", old.name, met) if await _replaced(run, old) else None


async def _replaced(run: Run, old: Role, **environment: str | int) -> Role | None:
    """Start another worker of a node and its spool, and wait for the older one to end; None if that was ending."""
    if old.struck or old.child is None or not old.child.alive or not old.kept:
        return None
    old.kept, old.struck = False, True
    run.cluster.losses.append(Loss(old.node, now(), now(), await _may_be_lost(run, old)))
    run.replaced += 1
    new = await run.cluster.add_worker(f"worker-{old.node}-{run.replaced}", old.node, **environment)
    await old.child.wait()
    await run.cluster.retire(old)
    return new


@kind("second worker of a node's name, another spool", 150)
async def second_worker(run: Run) -> Struck | None:
    """Met: the attempts on the node. It is refused, or takes over a node whose lease was over."""
    node = _a_worker(run).node
    met = await run.states(node)
    run.replaced += 1
    name, folder = f"other-{node}-{run.replaced}", f"{node}-other-{run.replaced}"
    began = now()
    run.cluster.contested[node] = math.inf
    other = await run.cluster.add_worker(name, node, folder, END_JOBS="true")  # or the node is its jobs' for as long
    other.kept, other.struck = False, True
    child, said = other.child, run.cluster.folder / f"{name}.err"
    assert child is not None
    await _within(20, lambda: not child.alive or b'"node_registered"' in said.read_bytes())
    took_over = child.alive
    await run.cluster.retire(other)
    run.cluster.contested[node] = now() + REFUSED_SECONDS
    if took_over:  # it came while the lease was over: what ran there is lost
        run.cluster.losses.append(Loss(node, began, now()))
    return Struck("second worker of a node's name, another spool", node, met, "took over" if took_over else "")


@kind("worker frozen beyond its lease", 60)
async def freeze_worker(run: Run) -> Struck | None:
    """Met: the attempts on its node; it is given nothing from the end of its lease on."""
    role = _a_worker(run)
    holder = Spool(run.cluster.spool_of(role) / "scripts").holder()
    if holder is None or holder.pid != (pid := run.cluster.worker_pid(role)):
        return None  # it has not registered yet, and an older one may still be heard
    met = await _on_node(run, role)
    lease = run.cluster.system.settings.lease_seconds
    os.kill(pid, signal.SIGSTOP)
    frozen = now()
    await asyncio.sleep(lease + run.luck.uniform(0.5, 2))
    thawed = now()
    still = run.cluster.worker_pid(role) == pid and run.cluster.of_node(role.node) == [role]
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    if still and frozen + lease + SLACK_SECONDS < thawed:
        run.silences.append(Silence(role.node, frozen + lease + SLACK_SECONDS, thawed))
    return Struck("worker frozen beyond its lease", role.name, met)


@kind("scheduler frozen", 100)
async def freeze_scheduler(run: Run) -> Struck | None:
    """Met: the jobs that wait, or are placed and not started, when the leader froze."""
    role = await leader_of(run.cluster)
    if role is None:
        return None
    await _a_moment(run)
    states = await run.states()
    met = {state: states.get(state, 0) for state in ("PENDING", "CONFIGURING")}
    pid = role.pid
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(run.luck.uniform(*run.freezes))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return Struck("scheduler frozen", role.name, met)


# PostgreSQL


async def _met_anywhere(run: Run) -> dict[str, int]:
    states = await run.states()
    found = {state: states.get(state, 0) for state in ("CONFIGURING", "RUNNING")}
    return {**found, "requests": sum(run.load.in_flight.values())}


async def _crash_postgres(run: Run, name: str, how: str) -> Struck:
    async with run.cluster.servers:
        await _a_moment(run)
        met = await _met_anywhere(run)
        await run.cluster.crash_postgres(how)  # type: ignore[arg-type]
    return Struck(name, "postgres", met)


@kind("PostgreSQL killed (-9)", 60)
async def kill_postgres(run: Run) -> Struck:
    """Met: the attempts anywhere, and the requests in flight. Every process of the server at once."""
    return await _crash_postgres(run, "PostgreSQL killed (-9)", "kill")


@kind("PostgreSQL stopped (immediate)", 150)
async def stop_postgres(run: Run) -> Struck:
    """Met: as when it is killed."""
    return await _crash_postgres(run, "PostgreSQL stopped (immediate)", "immediate")


@kind("PostgreSQL backend killed (-9)", 150)
async def kill_backend(run: Run) -> Struck:
    """Met: as when it is killed; the server ends all of its other processes, and recovers."""
    return await _crash_postgres(run, "PostgreSQL backend killed (-9)", "backend")


def _lose(name: str, every: float, role_kind: str) -> None:
    @kind(name, every)
    async def lose(run: Run) -> Struck | None:
        """Met: the jobs in that write."""
        leader = await leader_of(run.cluster) if role_kind == "scheduler" else None
        role = leader or _one_of(run, run.cluster.of(role_kind))  # type: ignore[arg-type]
        statement = run.luck.choice(WRITES[role_kind])
        role.postgres.lose(statement)
        with suppress(TimeoutError):
            await asyncio.wait_for(role.postgres.tripped.wait(), 5)
        role.postgres.keep()
        if not role.postgres.tripped.is_set():
            return None
        return Struck(name, role.name, {"writes": 1}, " ".join(statement.split())[:60])


_lose("answer to COMMIT lost: submit, cancel", 20, "api")
_lose("answer to COMMIT lost: allocate", 25, "scheduler")
_lose("answer to COMMIT lost: start, end", 20, "worker")


@kind("connections to PostgreSQL cut", 50)
async def cut_postgres(run: Run) -> Struck | None:
    """Met: the attempts on the worker's node; the jobs that wait or start; the requests in flight."""
    role = _one_of(run, list(run.cluster.roles.values()))
    await _a_moment(run)
    met = await _met_by(run, role)
    role.postgres.cut(away=False)
    return Struck("connections to PostgreSQL cut", role.name, met)


async def _met_by(run: Run, role: Role) -> dict[str, int]:
    if role.kind == "api":
        return {"requests": run.load.in_flight[role.name]}
    if role.kind == "worker":
        return await _on_node(run, role)
    states = await run.states()
    return {state: states.get(state, 0) for state in ("PENDING", "CONFIGURING")}


@kind("LISTEN connection silent", 100)
async def silence_listener(run: Run) -> Struck | None:
    """Met: the jobs that were placed by polls, before the silence was noticed."""
    role = await leader_of(run.cluster)
    if role is None or not role.postgres.silence_listeners():
        return None
    met: dict[str, int] = {}
    async with _meanwhile(run, met):
        await asyncio.sleep(1.5)
    return Struck("LISTEN connection silent", role.name, met)


# Redis

_STREAMS_THEN = """
local entries = 0
for _, stream in ipairs(KEYS) do entries = entries + redis.call('XLEN', stream) end
if entries > 0 then redis.call(unpack(ARGV)) end
return entries
"""


async def _when_something_is_on_its_way(run: Run, *command: str) -> dict[str, int]:
    """Do it at an instant at which streams hold entries and jobs wait for theirs; answer how many, or nothing."""
    client = run.cluster.redis_client()
    keys = [streams.stream_of(node) for node in run.cluster.nodes]
    try:
        for _ in range(TRIES):
            starting = (await run.states()).get("CONFIGURING", 0)
            try:
                if starting and (entries := await client.eval(_STREAMS_THEN, len(keys), *keys, *command)):
                    return {"CONFIGURING": starting, "entries": int(entries)}
            except (RedisError, OSError):
                return {}
            await asyncio.sleep(TRY_SECONDS)
    finally:
        await client.aclose()
    return {}


@kind("Redis emptied (FLUSHALL)", 30)
async def flush_redis(run: Run) -> Struck | None:
    """Met: the jobs that are placed and have not started, and the entries in the streams that speak of them."""
    async with run.cluster.servers:
        met = await _when_something_is_on_its_way(run, "FLUSHALL")
    return Struck("Redis emptied (FLUSHALL)", "redis", met) if met else None


@kind("Redis killed (-9), its data gone", 75)
async def lose_redis(run: Run) -> Struck | None:
    """Met: as when it is emptied, an instant before."""
    async with run.cluster.servers:
        met = await _when_something_is_on_its_way(run, "PING")
        await run.cluster.restart_redis(old=b"")
    return Struck("Redis killed (-9), its data gone", "redis", met)


@kind("Redis restarted from old data", 100)
async def age_redis(run: Run) -> Struck | None:
    """Met: as when it is emptied, an instant before. What comes back are entries and a group of some time ago."""
    async with run.cluster.servers:
        met = await _when_something_is_on_its_way(run, "PING")
        saved = await _saved(run)
        await run.cluster.restart_redis(old=run.snapshot or saved)
        run.snapshot = saved or run.snapshot
    return Struck("Redis restarted from old data", "redis", met)


async def _saved(run: Run) -> bytes:
    """A snapshot of what Redis holds."""
    client = run.cluster.redis_client()
    try:
        await client.save()
        return await asyncio.to_thread((run.cluster.redis.data_dir / "redis" / "dump.rdb").read_bytes)
    except (RedisError, OSError):
        return b""
    finally:
        await client.aclose()


@kind("consumer group dropped", 60)
async def drop_group(run: Run) -> Struck | None:
    """Met: as when all of it is emptied."""
    stream = streams.stream_of(_a_worker(run).node)
    async with run.cluster.servers:
        met = await _when_something_is_on_its_way(run, "XGROUP", "DESTROY", stream, streams.GROUP)
    return Struck("consumer group dropped", stream, met) if met else None


_PLACED = """
SELECT count(*) FROM job_events WHERE to_state = 'CONFIGURING' AND job_id > (SELECT max(job_id) - 1000 FROM jobs)
"""


@asynccontextmanager
async def _meanwhile(run: Run, met: dict[str, int]) -> AsyncIterator[None]:
    """Count the jobs that are placed while something is away: their entries cannot be written, or read."""
    before = await run.ask(_PLACED)
    yield
    after = await run.ask(_PLACED)
    if before and after:
        met["placed meanwhile"] = max(0, after[0][0] - before[0][0])


@kind("Redis out of memory", 90)
async def fill_redis(run: Run) -> Struck | None:
    """Met: the jobs that were placed meanwhile."""
    met: dict[str, int] = {}
    async with run.cluster.servers:
        client = run.cluster.redis_client()
        try:
            async with _meanwhile(run, met):
                await client.config_set("maxmemory", 1)
                await asyncio.sleep(run.luck.uniform(1, 3))
            await client.config_set("maxmemory", 0)
        except (RedisError, OSError):
            return None
        finally:
            await client.aclose()
    return Struck("Redis out of memory", "redis", met)


@kind("Redis away for seconds", 90)
async def hold_redis(run: Run) -> Struck | None:
    """Met: the jobs that were placed meanwhile. It accepts connections and answers nothing."""
    met: dict[str, int] = {}
    async with run.cluster.servers:
        assert run.cluster.redis.child is not None
        pid = run.cluster.redis.child.pid
        async with _meanwhile(run, met):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(run.luck.uniform(1, 7))
            os.kill(pid, signal.SIGCONT)
    return Struck("Redis away for seconds", "redis", met)


@kind("forged and repeated entries", 15)
async def forge(run: Run) -> Struck | None:
    """Met: the attempts that are CONFIGURING or RUNNING, which the entries speak of: at their node and at others."""
    rows = await run.ask(
        "SELECT job_id, attempt, node FROM jobs WHERE job_id > (SELECT max(job_id) - 30 FROM jobs) ORDER BY job_id"
    )
    states = await run.states()
    client = run.cluster.redis_client()
    try:
        for job_id, attempt, _ in rows:
            for node in run.cluster.nodes:
                fields: dict[Any, Any] = {
                    "kind": run.luck.choice(("run", "run", "cancel")),
                    "job_id": job_id,
                    "attempt": max(1, attempt + run.luck.choice((-1, 0, 0, 1))),
                }
                await client.xadd(streams.stream_of(node), fields)
        for fields in ({"x": "y"}, {"kind": "run", "job_id": "-1", "attempt": "1"}, {b"\xff": b"\x00"}):
            await client.xadd(streams.stream_of(run.luck.choice(sorted(run.cluster.nodes))), fields)  # type: ignore[arg-type]
    except (RedisError, OSError):
        return None
    finally:
        await client.aclose()
    met = {state: states.get(state, 0) for state in ("CONFIGURING", "RUNNING")}
    return Struck("forged and repeated entries", "redis", met)


# The node


@kind("node cut off from both servers", 75)
async def cut_node_off(run: Run) -> Struck | None:
    """Met: the attempts on the node. Shorter than its lease, or longer; nothing passes, and nothing is refused.

    Not while it is cut off already: the end of one would be the end of both.
    """
    role, lease = _a_worker(run), run.cluster.system.settings.lease_seconds
    met = await _on_node(run, role)
    if role.postgres.silent:
        return None
    long = lease + run.luck.uniform(1, 3)
    await _cut_off(run, role, run.luck.choice((run.luck.uniform(0.3, lease / 2), long)))
    return Struck("node cut off from both servers", role.name, met)


@kind("node cut off beyond REQUEUE_AFTER", 240)
async def cut_node_off_for_long(run: Run) -> Struck | None:
    """Met: the attempts on the node. It ends itself what may be requeued, and that is started elsewhere later."""
    role, settings = _a_worker(run), run.cluster.system.settings
    met = await _on_node(run, role)
    if role.postgres.silent:
        return None
    began = now()
    await _cut_off(run, role, settings.requeue_after + settings.kill_grace_seconds + run.luck.uniform(*run.freezes))
    run.cluster.losses.append(Loss(role.node, began + settings.requeue_after - settings.heartbeat_seconds, now()))
    return Struck("node cut off beyond REQUEUE_AFTER", role.name, met)


async def _cut_off(run: Run, role: Role, seconds: float) -> None:
    """Let nothing pass between a worker and the servers for so long."""
    role.postgres.silence()
    role.redis.silence()
    began, over = now(), run.cluster.system.settings.lease_seconds + SLACK_SECONDS
    await asyncio.sleep(seconds)
    ended = now()
    alone = run.cluster.of_node(role.node) == [role]
    await role.postgres.mend()
    await role.redis.mend()
    if alone and began + over < ended:
        run.silences.append(Silence(role.node, began + over, ended))


@contextmanager
def limited(pid: int, what: int, soft: int) -> Iterator[None]:
    """A limit of a live process, for the time of the block."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


async def _short_of(run: Run, name: str, limit: Callable[[int], AbstractContextManager[None]]) -> Struck | None:
    """Take something from a worker for a while. Met: the jobs that were placed meanwhile."""
    role = _a_worker(run)
    pid = run.cluster.worker_pid(role)
    if pid is None:
        return None
    met: dict[str, int] = {}
    with suppress(ProcessLookupError, FileNotFoundError):
        async with _meanwhile(run, met):
            with limit(pid):
                await asyncio.sleep(run.luck.uniform(1, 2))
    return Struck(name, role.name, met)


@kind("worker without descriptors", 120)
async def take_descriptors(run: Run) -> Struck | None:
    """It keeps those that it has."""
    return await _short_of(run, "worker without descriptors", no_more_descriptors)


def no_more_descriptors(pid: int) -> AbstractContextManager[None]:
    """Let a process open nothing more, for the time of the block."""
    return limited(pid, resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{pid}/fd")))


PIDS = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids").is_dir() else Path("/sys/fs/cgroup")
"""The root of the cgroups that count processes, of version 1 or 2."""


@functools.cache
def processes_cannot_be_limited() -> str | None:
    """Root has no limit but that of a cgroup."""
    if os.geteuid() != 0:
        return None
    group = PIDS / f"rowlock-{os.getpid()}"
    try:
        group.mkdir()
        there = (group / "pids.max").exists()
        group.rmdir()
    except OSError:
        there = False
    return None if there else "root may start any number of processes, and no cgroup can be made to limit them"


@contextmanager
def no_more_processes(pid: int) -> Iterator[None]:
    """Let a process start none, for the time of the block; what it started before lives on as it was."""
    if os.geteuid() != 0:
        with limited(pid, resource.RLIMIT_NPROC, 1):
            yield
        return
    line = next(
        line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.split(":")[1] in ("pids", "")
    )
    before, group = PIDS / line.split(":", 2)[2].lstrip("/"), PIDS / f"rowlock-{pid}"
    group.mkdir()
    try:
        (group / "pids.max").write_text("1")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with suppress(ProcessLookupError):
            (before / "cgroup.procs").write_text(str(pid))
        while True:
            try:
                group.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.01)  # it takes a moment after the last process has left


@kind("worker without processes", 120, processes_cannot_be_limited)
async def take_processes(run: Run) -> Struck | None:
    """It keeps those that it has."""
    return await _short_of(run, "worker without processes", no_more_processes)


@functools.cache
def no_disk_can_be_mounted() -> str | None:
    """Whether a small disk of one's own is allowed."""
    mount = (*words_for("unshare"), "--mount", "/bin/sh", "-c", "mount -t tmpfs tmpfs /mnt")
    done = subprocess.run(mount, capture_output=True, check=False)
    return None if done.returncode == 0 else "no disk can be mounted, not even in a namespace of one's own"


@kind("disk full", 120, no_disk_can_be_mounted)
async def fill_disk(run: Run) -> Struck | None:
    """Met: the attempts on the node, and those that were placed meanwhile. Scripts, output and exit records fit not."""
    if not run.cluster.disks:
        return None
    node, disk = run.luck.choice(sorted(run.cluster.disks.items()))
    met = await run.states(node)
    filler = disk.seen(disk.folder / "filler")
    try:
        async with _meanwhile(run, met):
            with suppress(OSError):
                await asyncio.to_thread(_fill, filler)
            await asyncio.sleep(run.luck.uniform(1, 3))
    finally:
        filler.unlink(missing_ok=True)
    return Struck("disk full", node, met)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def faketime() -> str | None:
    """Where libfaketime is, if it is."""
    given = os.environ.get("LIBFAKETIME")
    return given or next(iter(sorted(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1"))), None)


def no_clock_can_be_set() -> str | None:
    """Why the clock of one role cannot be stepped."""
    return None if faketime() else "libfaketime is not installed"


@contextmanager
def _shared_clocks_forgotten() -> Iterator[None]:
    """Remove what libfaketime shares among the processes of a tree, and leaves there when they are killed."""
    before = _shared_clocks()
    try:
        yield
    finally:
        for path, pid in _shared_clocks() - before:
            if not Path(f"/proc/{pid}").exists():
                path.unlink(missing_ok=True)


def _shared_clocks() -> set[tuple[Path, int]]:
    found = Path("/dev/shm").glob("*faketime_s*")  # noqa: S108 - where libfaketime has them
    return {(path, int(path.name.rpartition("_")[2])) for path in found}


@kind("clock stepped under a worker", 150, no_clock_can_be_set)
async def step_clock(run: Run) -> Struck | None:
    """Met: the attempts on the node. Its worker is replaced by one whose clock leaps, then by one of the right time."""
    role = _a_worker(run)
    clock = run.cluster.folder / f"clock-{role.node}"
    clock.write_text("+0")
    with _shared_clocks_forgotten():
        leaping = await _replaced(
            run,
            role,
            LD_PRELOAD=str(faketime()),
            FAKETIME_TIMESTAMP_FILE=str(clock),
            FAKETIME_NO_CACHE=1,
            FAKETIME_DONT_FAKE_MONOTONIC=1,
            DONT_FAKE_MONOTONIC=1,
        )
        if leaping is None:
            return None
        met: dict[str, int] = {}
        for leap in ("+2h", "-1d", "+0"):
            await asyncio.sleep(run.luck.uniform(0.5, 1.5))
            for state, count in (await run.states(role.node)).items():
                met[state] = met.get(state, 0) + count
            clock.write_text(leap)
        await _replaced(run, leaping)
    return Struck("clock stepped under a worker", role.name, met)
