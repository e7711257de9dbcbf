"""The table of legal transitions, the statements that move jobs, and the CHECKs of the schema agree over all pairs."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import product

import asyncpg
import pytest

from core.db import allocations, jobs
from core.db.audit import INVARIANTS, audit
from core.records import Attempt, Ending, Placement
from core.states import FINAL, TRANSITIONS, Reason, State, is_legal
from tests.builders import a_job, a_node, register, state_of, submit
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

HOLDING = (State.CONFIGURING, State.RUNNING)
ENDS = {(before, after) for before in HOLDING for after in TRANSITIONS[before] - {State.RUNNING}}

# Legal, and nothing does it yet: a job that waits until its deadline has passed.
NOT_BUILT = {(State.PENDING, State.DEADLINE)}

ATTEMPT = 1
NODE = "n1"


@pytest.fixture(scope="module")
async def module_connection(databases: Databases) -> AsyncIterator[asyncpg.Connection]:
    """One database for all: each case is undone."""
    name = await databases.create()
    connection = await asyncpg.connect(databases.url_of(name))
    await register(connection, a_node(NODE, 4))
    yield connection
    assert await audit(connection) == []
    await connection.close()
    await databases.drop(name)


@pytest.fixture
async def database(module_connection: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A node, in a transaction that is undone."""
    transaction = module_connection.transaction()
    await transaction.start()
    yield module_connection
    await transaction.rollback()


async def force(connection: asyncpg.Connection, state: State) -> int:
    """A job in `state`, with all that belongs to it, past the statements under test.

    Whatever its state, everything but the state fits a move as well as the CHECKs allow.
    """
    [job_id] = await submit(connection, a_job(2, requeue=True))
    placed, ended, ran = state in HOLDING, state in FINAL, state not in (State.PENDING, State.CONFIGURING)
    await connection.execute(
        """UPDATE jobs SET state = $2, attempt = $3, node = $4, allocate_time = CASE WHEN $4 <> '' THEN now() END,
                           start_time = CASE WHEN $5 THEN now() END, incarnation = CASE WHEN $5 THEN 1 END,
                           end_time = CASE WHEN $6 THEN now() END,
                           exit_code = CASE WHEN $6 THEN 0 END
           WHERE job_id = $1""",
        job_id, state, ATTEMPT, NODE if placed or ended else None, ran, ended,
    )  # fmt: skip
    if state is not State.PENDING:
        await connection.execute("DELETE FROM pending WHERE job_id = $1", job_id)
        await connection.execute(
            "INSERT INTO job_events (job_id, attempt, to_state, reason) VALUES ($1, $2, $3, 'None')",
            job_id, ATTEMPT, state,
        )  # fmt: skip
    if placed:
        await connection.execute(
            "INSERT INTO allocations (job_id, node, attempt, cpus) VALUES ($1, $2, $3, 2)", job_id, NODE, ATTEMPT
        )
        await connection.execute("UPDATE nodes SET alloc_cpus = 2")
    assert await audit_rows(connection) == []
    return job_id


async def audit_rows(connection: asyncpg.Connection) -> list[object]:
    """The audit inside the test's own transaction."""
    return [dict(row) for query in INVARIANTS.values() for row in await connection.fetch(query)]


Move = Callable[[asyncpg.Connection, int], Awaitable[object]]


async def outcome(connection: asyncpg.Connection, before: State, move: Move) -> tuple[bool, State]:
    """What a move answers of a job forced into `before`, and the job's state then. Nothing stays."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        job_id = await force(connection, before)
        applied = bool(await move(connection, job_id))
        assert await audit_rows(connection) == []
        return applied, await state_of(connection, job_id)
    finally:
        await transaction.rollback()


async def place(connection: asyncpg.Connection, job_id: int) -> object:
    return await allocations.place(connection, [Placement(job_id, NODE, 2)])


async def start(connection: asyncpg.Connection, job_id: int) -> object:
    return await jobs.start(connection, [Attempt(job_id, ATTEMPT)], node=NODE, incarnation=1)


async def request_cancel(connection: asyncpg.Connection, job_id: int) -> object:
    return await jobs.request_cancel(connection, Attempt(job_id, ATTEMPT))


def release(before: State, after: State) -> Move:
    async def move(connection: asyncpg.Connection, job_id: int) -> object:
        exit_code = 0 if before is State.RUNNING and after is not State.PENDING else None
        ending = Ending(job_id, ATTEMPT, after, Reason.NONE, exit_code=exit_code)
        return await allocations.release(connection, [ending], node=NODE, before=before, incarnation=1)

    return move


MOVES: dict[str, tuple[Move, set[tuple[State, State]]]] = {
    "place": (place, {(State.PENDING, State.CONFIGURING)}),
    "start": (start, {(State.CONFIGURING, State.RUNNING)}),
    "cancel_waiting": (jobs.cancel_waiting, {(State.PENDING, State.CANCELLED)}),
    "request_cancel": (request_cancel, {(State.RUNNING, State.RUNNING)}),
    **{f"release as {after} of {before}": (release(before, after), {(before, after)}) for before, after in ENDS},
}


@pytest.mark.parametrize("name", sorted(MOVES))
async def test_a_move_applies_to_its_own_state_alone(database: asyncpg.Connection, name: str) -> None:
    move, pairs = MOVES[name]
    found = {before: await outcome(database, before, move) for before in State}
    meant = {before: (False, before) for before in State} | {before: (True, after) for before, after in pairs}
    assert found == meant


DESIGN = """
PENDING      CONFIGURING CANCELLED DEADLINE
CONFIGURING  RUNNING PENDING CANCELLED
RUNNING      COMPLETED FAILED CANCELLED TIMEOUT OUT_OF_MEMORY NODE_FAIL PREEMPTED PENDING
"""


def test_the_table_is_that_of_the_design() -> None:
    """Written down a second time: all else here follows the table, wherever it goes."""
    meant = {line.split()[0]: set(line.split()[1:]) for line in DESIGN.strip().splitlines()}
    assert {state: {*TRANSITIONS[state]} for state in State} == {state: meant.get(state, set()) for state in State}


def test_the_moves_are_what_the_table_allows() -> None:
    made = {pair for _, pairs in MOVES.values() for pair in pairs if pair[0] is not pair[1]}
    legal = {(before, after) for before, after in product(State, State) if is_legal(before, after)}
    assert made | NOT_BUILT == legal
    assert not made & NOT_BUILT


@pytest.mark.parametrize("before", State)
async def test_an_end_that_the_table_does_not_allow_is_refused(database: asyncpg.Connection, before: State) -> None:
    """Also when the job is in just the state that is claimed."""
    job_id = await force(database, before)
    for after in set(State) - {after for state, after in ENDS if state is before}:
        with pytest.raises(ValueError, match=f"{before} does not end as {after}"):
            await release(before, after)(database, job_id)
    assert await state_of(database, job_id) is before


async def test_a_refused_ending_changes_nothing(database: asyncpg.Connection) -> None:
    job_id = await force(database, State.RUNNING)
    endings = [Ending(job_id, ATTEMPT, state, Reason.NONE) for state in (State.FAILED, State.DEADLINE)]
    with pytest.raises(ValueError, match="DEADLINE"):
        await allocations.release(database, endings, node=NODE, before=State.RUNNING, incarnation=1)
    assert await state_of(database, job_id) is State.RUNNING


def test_final_states_absorb() -> None:
    assert {state for state in State if not TRANSITIONS[state]} == FINAL
    assert set(TRANSITIONS) == set(State)


def test_every_state_can_be_reached_and_every_job_can_end() -> None:
    reached = {State.PENDING}
    while more := {after for before in reached for after in TRANSITIONS[before]} - reached:
        reached |= more
    assert reached == set(State)
    assert all(TRANSITIONS[state] & FINAL for state in set(State) - FINAL)


@pytest.mark.parametrize(("before", "restarts"), [(State.CONFIGURING, 0), (State.RUNNING, 1)])
async def test_what_goes_back_waits_as_if_it_had_not_run(
    database: asyncpg.Connection, before: State, restarts: int
) -> None:
    """Only restart_cnt tells, and it does not count what went back before it started."""
    job_id = await force(database, before)
    await release(before, State.PENDING)(database, job_id)
    job = await jobs.get(database, job_id)
    assert job is not None
    assert (job.node, job.allocate_time, job.start_time, job.end_time, job.exit_code) == (None,) * 5
    assert (job.attempt, job.restart_cnt) == (ATTEMPT, restarts)
    [attempt] = [placed.attempt for placed in await allocations.place(database, [Placement(job_id, NODE, 2)])]
    assert attempt == ATTEMPT + 1


CONSTRAINT = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1"


@pytest.mark.parametrize(("name", "states"), [("job_state_check", set(State)), ("ended", set(State) - FINAL)])
async def test_a_check_names_the_states_of_the_table(
    database: asyncpg.Connection, name: str, states: set[State]
) -> None:
    text = await database.fetchval(CONSTRAINT, name)
    assert set(re.findall(r"'([A-Z_]+)'", text)) == states


INSERT = """
INSERT INTO jobs (state, attempt, name, account, partition, tasks, cpus_per_task, cpus, requeue, node, start_time,
                  end_time, exit_code)
VALUES ($1::text, 1, 'j', 'a', 'p', 1, 1, 1, false, CASE WHEN $1 <> 'PENDING' THEN 'n1' END,
        CASE WHEN $1 <> 'PENDING' THEN now() END, CASE WHEN $2 THEN now() END, CASE WHEN $1 = 'COMPLETED' THEN 0 END)
RETURNING job_id
"""


async def stored(connection: asyncpg.Connection, state: str, *, ended: bool) -> str | None:
    """The CHECK that refuses such a row, if one does. Nothing stays."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(INSERT, state, ended)
    except asyncpg.CheckViolationError as error:
        return error.constraint_name
    finally:
        await transaction.rollback()
    return None


async def test_a_job_has_an_end_time_exactly_in_a_final_state(database: asyncpg.Connection) -> None:
    """Everything else fits, so it is this CHECK that decides (or the one on exit_code, which needs an end, too)."""
    found = {(state, ended): await stored(database, state, ended=ended) for state in State for ended in (False, True)}
    refused = {case for case, constraint in found.items() if constraint is not None}
    assert refused == {(state, state not in FINAL) for state in State}
    assert {found[case] for case in refused} <= {"ended", "exit_after_end"}


async def test_no_other_state_can_be_stored(database: asyncpg.Connection) -> None:
    assert await stored(database, "SUSPENDED", ended=False) == "job_state_check"


async def test_the_audit_sees_a_forced_state(database: asyncpg.Connection) -> None:
    """The cases above are honest only if a dishonest one is found out."""
    [job_id] = await submit(database)
    await database.execute("UPDATE jobs SET state = 'CANCELLED', end_time = now() WHERE job_id = $1", job_id)
    assert await audit_rows(database) != []
