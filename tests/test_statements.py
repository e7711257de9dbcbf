"""Every statement fits the real schema; the hot ones never read a whole table; changes of state are HOT updates."""

import ast
import inspect
import json
import pkgutil
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib import import_module
from random import Random
from types import ModuleType
from typing import Any

import asyncpg
import pytest

import core.db
from bench.statements import HOT, Recorder, Tables
from core.db import allocations, audit, jobs, pending
from core.db.connection import PLANNED_ONCE, SESSION
from core.policy import plan
from core.records import Capacity, Ending, Waiting
from core.states import Reason, State
from services.cli.doctor import postgres
from services.scheduler import lead
from services.scheduler.allocate import BATCH
from tests.builders import a_job, a_node, allocate, finish, register, start, submit
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")


def modules() -> list[ModuleType]:
    found = [import_module(f"core.db.{info.name}") for info in pkgutil.iter_modules(core.db.__path__) if not info.ispkg]
    return [*found, lead, postgres]


def is_statement(name: str, value: object) -> bool:
    return name.isupper() and isinstance(value, str) and value.split(maxsplit=1)[:1] in [[verb] for verb in VERBS]


def statements() -> dict[str, str]:
    """Every statement of core/db, by where it stands."""
    return {
        **{
            f"{module.__name__}.{name}": value
            for module in modules()
            for name, value in vars(module).items()
            if is_statement(name, value)
        },
        **{f"core.db.audit: {name}": query for name, query in audit.INVARIANTS.items()},
    }


@pytest.fixture(scope="module")
async def full(databases: Databases) -> AsyncIterator[asyncpg.Connection]:
    """A database in which 100,000 jobs wait, 20,000 have ended and every node is full."""
    name = await databases.create()
    connection = await asyncpg.connect(databases.url_of(name), server_settings=SESSION)
    await connection.execute("SET statement_timeout = 0")
    await connection.execute(FILL)
    await connection.execute("VACUUM ANALYZE")
    yield connection
    assert await audit.audit(connection) == []
    await connection.close()
    await databases.drop(name)


FILL = """
INSERT INTO nodes (name, partitions, declared_cpus, cpus, alloc_cpus, memory_mib, work_base_dir, job_user)
SELECT 'n' || i, '{default}', 64, 64, 64, 1024, '/jobs', 'nobody' FROM generate_series(1, 8) AS i;

INSERT INTO node_leases (node, incarnation, spool_since, spool_id, hostname, heartbeat_time, lease_until, address,
                         secret, version, grace_seconds, requeue_after_seconds)
SELECT name, 1, 1, name, 'here', now(), now() + interval '1 hour', 'http://127.0.0.1:1', 's', '0', 1, 60 FROM nodes;

-- The oldest 20,000 are over, 512 hold CPUs, the rest waits.
INSERT INTO jobs (name, account, partition, tasks, cpus_per_task, cpus, requeue)
SELECT 'job', 'account' || i % 10, 'default', 1, 1 + i % 4, 1 + i % 4, false
FROM generate_series(1, 120512) AS i ORDER BY i;

UPDATE jobs SET state = 'COMPLETED', attempt = 1, node = 'n1', start_time = now(), end_time = now(), exit_code = 0
WHERE job_id <= 20000;
UPDATE jobs SET state = CASE WHEN job_id % 2 = 0 THEN 'RUNNING' ELSE 'CONFIGURING' END, attempt = 1, cpus = 1,
                cpus_per_task = 1, node = 'n' || 1 + job_id % 8,
                start_time = CASE WHEN job_id % 2 = 0 THEN now() END, incarnation = 1
WHERE job_id BETWEEN 20001 AND 20512;

INSERT INTO allocations (job_id, node, attempt, cpus) SELECT job_id, node, 1, cpus FROM jobs
WHERE state IN ('RUNNING', 'CONFIGURING');
INSERT INTO job_specs (job_id, script, environment, standard_output, cpus_per_task_given, tasks_per_node_given,
                       submission)
SELECT job_id, '#!/bin/sh', '{}', 'slurm-%j.out', true, false, job_id FROM jobs;
INSERT INTO idempotency_keys (account, key, job_id, digest) SELECT account, job_id, job_id, '' FROM jobs;
INSERT INTO pending (partition, cpus, job_id) SELECT partition, cpus, job_id FROM jobs WHERE state = 'PENDING';
INSERT INTO outputs (job_id, attempt, restart_cnt) SELECT job_id, 1, 1 FROM jobs;
INSERT INTO job_events (job_id, attempt, to_state, reason) SELECT job_id, 0, state, 'None' FROM jobs;
"""


# Each constant


def test_the_statements_are_found() -> None:
    names = set(statements())
    assert {"core.db.allocations._PLACE", "core.db.schema._VERSION", "services.scheduler.lead._PROBE"} <= names
    assert len([name for name in names if name.startswith("core.db.")]) >= 30


def test_a_statement_is_written_down_not_built() -> None:
    """A plain literal, right above the one function that runs it."""
    for module in modules():
        tree = ast.parse(inspect.getsource(module))
        for node in tree.body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            if is_statement(name, getattr(module, name)):
                assert isinstance(node.value, ast.Constant), f"{module.__name__}.{name} is built"
                assert name.startswith("_"), f"{module.__name__}.{name} is for its module alone"
                users = [f.name for f in tree.body if isinstance(f, ast.AsyncFunctionDef) and name in names_in(f)]
                assert len(users) == 1, f"{module.__name__}.{name} is run by {users}"


def names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


async def test_every_statement_fits_the_schema(connection: asyncpg.Connection) -> None:
    for where, text in statements().items():
        try:
            await connection.prepare(text)
        except asyncpg.PostgresError as error:
            pytest.fail(f"{where}: {error}")


# Plans


WAITING = range(20_513, 120_513)
HELD = range(20_001, 20_513)


TABLES = Tables(WAITING, HELD, "n1", 1, a_job())

LARGE = {"jobs", "pending", "job_specs", "outputs", "job_events", "idempotency_keys"}


async def custom_plan(connection: asyncpg.Connection, text: str, arguments: Sequence[object]) -> Any:
    """The plan for these very values: what a connection's first five runs get."""
    [[document]] = await connection.fetch(f"EXPLAIN (FORMAT JSON) {text}", *arguments)
    return json.loads(document)


async def generic_plan(connection: asyncpg.Connection, text: str, arguments: Sequence[object]) -> Any:
    """The plan for any values: what later runs may get."""
    nulls = ", ".join("NULL" for _ in arguments)
    async with connection.transaction():
        await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.execute(f"PREPARE planned AS {text}")
        [[document]] = await connection.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE planned{f'({nulls})' if nulls else ''}")
        await connection.execute("DEALLOCATE planned")
    return json.loads(document)


def scans(tree: Any) -> Iterator[str]:
    """The tables that a plan reads from end to end."""
    if isinstance(tree, list):
        for branch in tree:
            yield from scans(branch)
    elif isinstance(tree, dict):
        if tree.get("Node Type") == "Seq Scan":
            yield tree["Relation Name"]
        for branch in tree.values():
            yield from scans(branch)


@pytest.mark.parametrize("count", [1, 8, 500])
@pytest.mark.parametrize("planned", [custom_plan, generic_plan])
@pytest.mark.parametrize("name", HOT)
async def test_a_hot_statement_reads_no_large_table(
    full: asyncpg.Connection, name: str, planned: Any, count: int
) -> None:
    recorder = Recorder()
    await HOT[name](recorder, count, TABLES)
    [(text, arguments)] = recorder.ran
    found = await planned(full, text, arguments)
    assert set(scans(found)) & LARGE == set(), json.dumps(found, indent=1)


@pytest.mark.parametrize("free", [1, 3, 8])
async def test_the_cost_of_a_pass_is_that_of_what_fits(full: asyncpg.Connection, free: int) -> None:
    """Rows touched, not time: what waits behind is not read."""
    transaction = full.transaction()
    await transaction.start()
    try:
        await full.execute("UPDATE nodes SET alloc_cpus = 64 - $1", free)
        recorder = Recorder()
        await pending.look(recorder, BATCH)  # type: ignore[arg-type]
        [(text, arguments)] = recorder.ran
        [[document]] = await full.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}", *arguments)
        waiting, free_nodes = await pending.look(full, BATCH)
    finally:
        await transaction.rollback()
    shapes = 4
    assert len(waiting) >= 8 * free
    assert rows_read(json.loads(document)) <= len(waiting) + 2 * len(free_nodes) + 3 * shapes


@pytest.mark.parametrize("count", [1, 8, 60])
async def test_the_cost_of_a_turn_over_is_that_of_what_ends_and_what_is_taken(
    full: asyncpg.Connection, count: int
) -> None:
    """Each row of either is read when it is found, locked and written, in a few tables; what waits behind is not."""
    ended = [Ending(job_id, 1, State.COMPLETED, Reason.NONE, exit_code=0) for job_id in HELD if job_id % 8 == 0][:count]
    transaction = full.transaction()
    await transaction.start()
    try:
        for name, value in PLANNED_ONCE.items():
            await full.execute(f"SET LOCAL {name} = {value}")
        recorder = Recorder()
        await allocations.turn_over(recorder, ended, node="n1", incarnation=1, take=True)  # type: ignore[arg-type]
        [(text, arguments)] = recorder.ran
        [[document]] = await full.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}", *arguments)
        taken = await full.fetchval("SELECT count(*) FROM jobs WHERE job_id >= $1 AND state = 'RUNNING'", WAITING[0])
    finally:
        await transaction.rollback()
    shapes = 4
    assert count / 4 <= taken <= count
    assert (
        rows_read(json.loads(document)) <= 7 * (count + taken) + sum(count // n + 1 for n in range(1, 5)) + 3 * shapes
    )


STATES = [
    (State.DEADLINE,),  # of no job
    (State.PENDING,),
    (State.CONFIGURING, State.RUNNING),
    (State.COMPLETED,),
    (State.COMPLETED, State.RUNNING, State.FAILED, State.PENDING),
    tuple(State),
]


@pytest.mark.parametrize("states", STATES, ids=str)
@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("after", [None, 20_256])
async def test_the_cost_of_a_list_by_states_is_that_of_what_it_shows(
    full: asyncpg.Connection, states: tuple[State, ...], *, newest_first: bool, after: int | None
) -> None:
    """At both ends lies what others wait for, and in between what runs."""
    wanted, limit = jobs.Filter(states=states), 50
    recorder = Recorder()
    await jobs.page(recorder, wanted, newest_first=newest_first, after=after, limit=limit)  # type: ignore[arg-type]
    [(text, arguments)] = recorder.ran
    [[document]] = await full.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}", *arguments)
    found = await jobs.page(full, wanted, newest_first=newest_first, after=after, limit=limit)
    held = 2 * len(HELD) if {State.CONFIGURING, State.RUNNING} & {*states} else 0
    assert rows_read(json.loads(document)) <= (len(states) + 5) * limit + held
    assert [job.job_id for job in found] == [
        row[0]
        for row in await full.fetch(
            "SELECT job_id FROM jobs WHERE state = ANY ($1) AND CASE WHEN $2 THEN job_id < $3 ELSE job_id > $3 END"
            " ORDER BY CASE WHEN $2 THEN -job_id ELSE job_id END LIMIT 50",
            states,
            newest_first,
            after or (10**9 if newest_first else 0),
        )
    ]


def rows_read(tree: Any) -> float:
    """The rows that a plan took from tables, in all its loops."""
    if isinstance(tree, list):
        return sum(map(rows_read, tree))
    if not isinstance(tree, dict):
        return 0
    own = tree["Actual Rows"] * tree["Actual Loops"] if tree.get("Relation Name") else 0
    return own + sum(rows_read(branch) for branch in tree.values())


# What waits, by shape


async def have_room(connection: asyncpg.Connection, free: Sequence[Capacity]) -> None:
    """Let these be the nodes."""
    await connection.execute("DELETE FROM nodes")
    for node in free:
        await register(connection, a_node(node.name, node.free_cpus, partitions=tuple(node.partitions)))


@pytest.mark.parametrize("seed", range(6))
async def test_what_is_seen_is_enough_for_the_whole_decision(connection: asyncpg.Connection, seed: int) -> None:
    """What is decided with the oldest of each shape is what would be decided with all that waits."""
    random = Random(seed)
    partitions = ["batch", "big", "debug"]
    wanted = [a_job(random.randint(1, 9), partition=random.choice(partitions)) for _ in range(120)]
    ids = await submit(connection, *wanted)
    everything = [Waiting(i, job.partition, job.cpus) for i, job in zip(ids, wanted, strict=True)]
    for _ in range(5):
        free = [
            Capacity(name, frozenset(random.sample(partitions, random.randint(1, 3))), random.randint(1, 20))
            for name in random.sample("abcdef", random.randint(0, 6))
        ]
        await have_room(connection, free)
        for limit in (1, 3, BATCH):
            waiting, found = await pending.look(connection, limit)
            assert sorted(found, key=lambda node: node.name) == sorted(free, key=lambda node: node.name)
            assert plan(waiting, found)[:limit] == plan(everything, free)[:limit]


async def test_the_oldest_of_each_shape_that_fits_are_seen(connection: asyncpg.Connection) -> None:
    cpus = [2, 1, 2, 9, 1, 1, 2, 4]
    ids = await submit(connection, *(a_job(n) for n in cpus), a_job(1, partition="other"))
    default = frozenset({"default"})
    await have_room(connection, [Capacity("a", default, 4), Capacity("b", default, 1)])
    waiting, _ = await pending.look(connection, BATCH)
    # Of 5 free CPUs two jobs of 2 may be used, all of 1, one of 4; 9 fits no node.
    assert [(job.job_id, job.cpus) for job in waiting] == [(ids[i], cpus[i]) for i in (0, 1, 2, 4, 5, 7)]
    await have_room(connection, [Capacity("a", default, 1)])
    [exact], _ = await pending.look(connection, BATCH)
    assert exact.job_id == ids[1]


async def test_nothing_is_seen_when_nothing_waits(connection: asyncpg.Connection) -> None:
    """Or the idle poll of a large cluster would read all its nodes."""
    await have_room(connection, [Capacity("a", frozenset({"default"}), 4)])
    assert await pending.look(connection, BATCH) == ([], [])


# HOT updates


async def updates(connection: asyncpg.Connection) -> tuple[int, int]:
    """How many rows of jobs were updated since the statistics began, and how many of them without the indexes."""
    await connection.execute("SELECT pg_stat_force_next_flush()")
    row = await connection.fetchrow("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'")
    assert row is not None
    return row[0], row[1]


async def test_changes_of_state_are_hot_updates(connection: asyncpg.Connection) -> None:
    """Of a few jobs, so that their page has room for what the fill factor is meant for."""
    await register(connection, a_node("n1", 8))
    await submit(connection, *[a_job()] * 8)
    placed = await allocate(connection)
    await start(connection, *placed)
    for attempt in placed[:4]:
        await jobs.request_cancel(connection, attempt)
    await finish(connection, *placed)
    assert await updates(connection) == (28, 28)


async def test_no_index_stands_in_the_way_of_a_hot_update(connection: asyncpg.Connection) -> None:
    """Neither a column that changes in a job's life nor a condition on one."""
    indexed = await connection.fetch(
        """SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
           WHERE i.indrelid = 'jobs'::regclass"""
    )
    assert {row[0] for row in indexed} == {"job_id", "account", "name"}
    conditions = await connection.fetchval(
        "SELECT count(*) FROM pg_index WHERE indrelid = 'jobs'::regclass AND num_nonnulls(indpred, indexprs) > 0"
    )
    assert conditions == 0


# The audit


BREAKS = {
    "key": [
        "INSERT INTO idempotency_keys (account, key, job_id, digest) VALUES ('test', 'k', 1000000, '')",
        "INSERT INTO idempotency_keys (account, key, job_id, digest) SELECT 'other', 'k', job_id, '' FROM pending",
    ],
    "capacity": ["UPDATE nodes SET alloc_cpus = alloc_cpus - 1", "UPDATE allocations SET cpus = cpus + 1"],
    "ledger": [
        "DELETE FROM allocations",
        "UPDATE allocations SET attempt = 9",
        "UPDATE jobs SET cpus = 2 WHERE state = 'RUNNING'",
        "INSERT INTO allocations (job_id, node, attempt, cpus) SELECT job_id, 'n1', 0, cpus FROM pending",
    ],
    "queue": [
        "DELETE FROM pending",
        "UPDATE pending SET cpus = 9",
        "UPDATE pending SET partition = 'other'",
        "INSERT INTO pending (job_id, partition, cpus) SELECT job_id, partition, cpus FROM jobs WHERE attempt = 1",
    ],
    "specification": [
        "DELETE FROM job_specs WHERE job_id IN (SELECT job_id FROM pending)",
        "UPDATE job_specs SET job_id = job_id + 1000",
    ],
    "one end": [
        "DELETE FROM job_events WHERE to_state = 'COMPLETED'",
        "INSERT INTO job_events (job_id, attempt, to_state, reason) SELECT job_id, 1, state, 'None' FROM jobs"
        " WHERE end_time IS NOT NULL",
        "INSERT INTO job_events (job_id, attempt, to_state, reason) SELECT job_id, 0, 'RUNNING', 'None' FROM pending",
    ],
    "one start": [
        "INSERT INTO job_events (job_id, attempt, to_state, reason) SELECT job_id, attempt, 'RUNNING', 'None'"
        " FROM jobs WHERE state = 'RUNNING'"
    ],
    "fencing": [
        "UPDATE jobs SET incarnation = 9 WHERE state = 'RUNNING'",
        "UPDATE jobs SET incarnation = NULL WHERE state = 'RUNNING'",
    ],
    "restart": [
        "UPDATE jobs SET restart_cnt = 1 WHERE state = 'COMPLETED'",
        "UPDATE jobs SET restart_cnt = 2, requeue = true WHERE state = 'COMPLETED'",
    ],
    "output": [
        "DELETE FROM outputs",
        "UPDATE outputs SET attempt = 1",
        "UPDATE outputs SET restart_cnt = 2",
    ],
    "exit": ["UPDATE jobs SET exit_code = NULL WHERE state = 'TIMEOUT'"],
}


async def test_the_audit_sees_what_breaks_an_invariant(connection: asyncpg.Connection) -> None:
    """One job waits, one is CONFIGURING, one RUNNING, three have ended, one as a restart; each break is undone."""
    await register(connection)
    await submit(connection, a_job(requeue=True))
    for state in (State.PENDING, State.COMPLETED):
        [restarted] = await allocate(connection)
        await start(connection, restarted)
        await finish(connection, restarted, state=state)
    await submit(connection, *[a_job()] * 4)
    _, running, completed, timeout = await allocate(connection)
    await start(connection, running, completed, timeout)
    await finish(connection, completed)
    await finish(connection, timeout, state=State.TIMEOUT)
    await submit(connection)
    assert await audit.audit(connection) == []
    assert {name.split(":")[0] for name in audit.INVARIANTS} == set(BREAKS)
    for name, query in audit.INVARIANTS.items():
        assert await connection.fetch(query) == []
        for change in BREAKS[name.split(":")[0]]:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(change)
            assert await connection.fetch(query) != [], change
            await transaction.rollback()
