"""The real statements in any order: a model of what each may do stands beside them, and the audit after each step."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from core.db import allocations, jobs, nodes, outputs
from core.db.audit import INVARIANTS
from core.records import Attempt, Ending, Output
from core.states import FINAL, Reason, State
from tests.builders import a_job, a_node, allocate, an_ending
from tests.conftest import Databases

T = TypeVar("T")

NAMES = ("n1", "n1", "n1", "n2")
# Mostly what makes a node fit, or nothing would ever run on it.
EVENTS = ("registers", "registers", "beats", "beats", "beats", "resumes", "resumes", "falls", "ends", "drains")
STEPS = (
    *["a_worker_starts", "attempts_end"] * 3,
    *["a_pass", "something_befalls_a_node"] * 2,
    *["attempts_end_for_good", "jobs_are_submitted", "a_job_is_cancelled", "what_cannot_start_goes_back"],
)
BACK = st.sampled_from((0, 0, 0, 1))
"""How many incarnations a worker is behind."""
CPUS = st.integers(1, 4)
HERE, GONE = "here", "gone"

_EMPTY = """
TRUNCATE jobs, job_specs, pending, allocations, outputs, job_events, node_leases, nodes RESTART IDENTITY CASCADE
"""

_STATES = """
SELECT j.job_id, j.state, j.attempt, j.node, j.restart_cnt, j.cancel_requested_time IS NOT NULL AS cancelled
FROM jobs j ORDER BY j.job_id
"""

# The whole audit in one statement: after each step it is most of what this costs.
_AUDIT = " UNION ALL ".join(
    f"SELECT '{name.partition(':')[0]}', to_jsonb(broken) FROM ({query}) AS broken"
    for name, query in INVARIANTS.items()
)

_HELD = "SELECT name, alloc_cpus, cpus FROM nodes ORDER BY name"


@dataclass(slots=True)
class Known:
    """What the model knows of a job."""

    cpus: int
    state: State = State.PENDING
    attempt: int = 0
    node: str | None = None
    restarts: int = 0
    cancelled: bool = False


@dataclass(slots=True)
class Place:
    """What the model knows of a node: the CPUs that its worker declares, and whether its lease lives."""

    declared: int
    incarnation: int
    lease: str = HERE
    draining: bool = False
    admin: str = "RESUME"


@dataclass(slots=True)
class Server:
    """A database, and a loop to speak to it on."""

    runner: asyncio.Runner
    connection: asyncpg.Connection

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it to its end."""
        return self.runner.run(coroutine)


@pytest.fixture
def server(databases: Databases) -> Iterator[Server]:
    with asyncio.Runner() as runner:
        name = runner.run(databases.create())
        connection = runner.run(asyncpg.connect(databases.url_of(name)))
        try:
            yield Server(runner, connection)
        finally:
            runner.run(connection.close())
            runner.run(databases.drop(name))


class Life(RuleBasedStateMachine):
    """Jobs and nodes, whatever happens to them. Every answer of a statement is foretold by the model."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[int, Known] = {}
        self.nodes: dict[str, Place] = {}
        self.everything: list[Attempt] = []
        self.db = self.server.connection

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.server.do(coroutine)

    @initialize(cpus=CPUS, sizes=st.lists(CPUS, max_size=3), busy=st.booleans())
    def begin(self, cpus: int, sizes: list[int], busy: bool) -> None:
        self.do(self.db.execute(_EMPTY))
        self.a_worker_registers("n1", cpus, same_spool=True)
        self._submit([1, cpus, *sizes])
        if busy:  # or most of what ends would find nothing that runs
            self._start(self._pass(), "n1", 1, fit=True)

    # Nodes

    @rule(data=st.data(), what=st.sampled_from(STEPS))
    def something_happens(self, data: st.DataObject, what: str) -> None:
        """One rule for all: of several, Hypothesis leaves some out in each example, and little would come far."""
        getattr(self, what)(data)

    def something_befalls_a_node(self, data: st.DataObject) -> None:
        """Its worker comes, comes again, speaks, or is not heard of any more."""
        name, what = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(EVENTS))
        match what:
            case "registers":
                self.a_worker_registers(name, data.draw(CPUS), same_spool=data.draw(st.booleans()))
            case "beats":
                self.a_heartbeat(name, data.draw(BACK), draining=data.draw(BACK) > 0)
            case "falls":
                self.a_lease_is_over(name)
            case "ends":
                self.a_lease_is_given_up(name, data.draw(BACK))
            case _:
                self.a_node_drains_itself_or_resumes(name, drains=what == "drains")

    def a_worker_registers(self, name: str, cpus: int, *, same_spool: bool) -> None:
        """For the first time, again, and smaller or larger. Another spool only once the lease is over."""
        place = self.nodes.get(name)
        spool = "spool" if same_spool else f"another of {len(self.jobs)}"
        spec = a_node(name, cpus, spool_id=spool)
        owner = self.do(self.db.fetchval("SELECT spool_id FROM node_leases WHERE node = $1", name))
        taken = place is not None and place.lease == HERE and owner != spool
        incarnation = self.do(self._in_transaction(lambda: nodes.register(self.db, spec, 3600)))
        if taken:
            assert incarnation is None
            return
        assert incarnation == (place.incarnation + 1 if place else 1)
        admin = place.admin if place else "RESUME"
        self.nodes[name] = Place(cpus, incarnation, admin=admin)

    async def _in_transaction(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self.db.transaction():
            return await work()

    def a_heartbeat(self, name: str, back: int, *, draining: bool) -> None:
        """Of the worker that is current, or of the one before it."""
        place = self.nodes.get(name)
        incarnation = (place.incarnation if place else 1) - back
        beats = self.do(
            nodes.heartbeat(self.db, name, incarnation, lease_seconds=3600, draining=draining, cpu_load=0.0)
        )
        assert beats == (place is not None and back == 0)
        if place is not None and beats:
            place.lease, place.draining = HERE, draining

    def a_lease_is_over(self, name: str) -> None:
        self.do(self.db.execute("UPDATE node_leases SET lease_until = now() - interval '1 s' WHERE node = $1", name))
        if name in self.nodes:
            self.nodes[name].lease = GONE

    def a_lease_is_given_up(self, name: str, back: int) -> None:
        place = self.nodes.get(name)
        if place is not None:
            self.do(nodes.give_up_lease(self.db, name, place.incarnation - back))
            if back == 0:
                place.lease, place.draining = GONE, True

    def a_node_drains_itself_or_resumes(self, name: str, *, drains: bool) -> None:
        place = self.nodes.get(name)
        if place is None:
            return
        if drains:
            changed = self.do(nodes.drain_itself(self.db, name, place.incarnation, "full"))
            assert changed == (place.admin == "RESUME")
        else:
            changed = self.do(nodes.resume_itself(self.db, name, place.incarnation))
            assert changed == (place.admin == "DRAIN")
        place.admin = "DRAIN" if drains else "RESUME"

    # Jobs

    def jobs_are_submitted(self, data: st.DataObject) -> None:
        """Those that no node could ever run are not taken."""
        self._submit(data.draw(st.lists(CPUS, min_size=1, max_size=3)))

    def _submit(self, sizes: list[int]) -> None:
        largest = max((place.declared for place in self.nodes.values()), default=None)
        stored = self.do(jobs.insert(self.db, [a_job(size, requeue=True) for size in sizes]))
        for size, row in zip(sizes, stored, strict=True):
            assert (row is None) == (largest is not None and size > largest)
            if row is not None:
                self.jobs[row.job_id] = Known(size)

    def a_pass(self, data: st.DataObject) -> None:
        self._pass()

    def _pass(self) -> list[Attempt]:
        """What it places was waiting, and fits where it is placed; what it leaves fits nowhere."""
        free = self._free()
        placed = self.do(allocate(self.db))
        for attempt in placed:
            job = self.jobs[attempt.job_id]
            row = self.do(jobs.get(self.db, attempt.job_id))
            assert row is not None
            assert row.node is not None
            assert (job.state, attempt.attempt) == (State.PENDING, job.attempt + 1)
            free[row.node] -= job.cpus
            job.state, job.attempt, job.node = State.CONFIGURING, attempt.attempt, row.node
            self.everything.append(attempt)
        assert all(left >= 0 for left in free.values())
        waiting = [job.cpus for job in self.jobs.values() if job.state is State.PENDING]
        assert not waiting or min(waiting) > max(free.values(), default=0)
        return placed

    def _free(self) -> dict[str, int]:
        """The CPUs that may be given out, by node."""
        held = {name: self._held(name) for name in self.nodes}
        usable = {
            name: place
            for name, place in self.nodes.items()
            if place.lease == HERE and not place.draining and place.admin == "RESUME"
        }
        return {name: max(place.declared, held[name]) - held[name] for name, place in usable.items()}

    def _held(self, name: str) -> int:
        active = (State.CONFIGURING, State.RUNNING)
        return sum(job.cpus for job in self.jobs.values() if job.node == name and job.state in active)

    def a_worker_starts(self, data: st.DataObject) -> None:
        """Any attempts that there ever were, in any order, on behalf of the current worker or the one before it."""
        name, back = data.draw(st.sampled_from(NAMES)), data.draw(BACK)
        attempts = self._some(data, State.CONFIGURING)
        place = self.nodes.get(name)
        incarnation = (place.incarnation if place else 1) - back
        fit = place is not None and back == 0 and not place.draining
        self._start(attempts, name, incarnation, fit=fit)
        self._restarts_say_where_they_begin(self._some(data, State.RUNNING), name, data.draw(BACK))

    def _start(self, attempts: list[Attempt], name: str, incarnation: int, *, fit: bool) -> None:
        expected = {a for a in attempts if fit and self._is(a, State.CONFIGURING, name)}
        started = self.do(jobs.start(self.db, attempts, node=name, incarnation=incarnation))
        assert {Attempt(spec.job_id, spec.attempt) for spec in started} == expected
        assert len(started) == len(expected)
        for attempt in expected:
            self.jobs[attempt.job_id].state = State.RUNNING
        self._restarts_say_where_they_begin(list(expected), name, 0)

    def _restarts_say_where_they_begin(self, attempts: list[Attempt], name: str, back: int) -> None:
        """Those that have just started, and others, on behalf of the current worker or the one before it."""
        place = self.nodes.get(name)
        incarnation = (place.incarnation if place else 1) - back
        restarts = {a: self.jobs[a.job_id].restarts for a in attempts if a.job_id in self.jobs}
        begun = [Output(a.job_id, a.attempt, count, 0, None) for a, count in restarts.items() if count > 0]
        stored = self.do(outputs.store(self.db, begun, node=name, incarnation=incarnation))
        fit = place is not None and back == 0
        assert stored == {a for a, count in restarts.items() if fit and count > 0 and self._is(a, State.RUNNING, name)}

    def _some(self, data: st.DataObject, state: State) -> list[Attempt]:
        """Some of those that are in a state, and some that ever were, in any order."""
        now = [Attempt(job_id, job.attempt) for job_id, job in self.jobs.items() if job.state is state]
        fit = data.draw(st.lists(st.sampled_from(now), min_size=1, max_size=3)) if now else []
        late = data.draw(st.lists(st.sampled_from(self.everything or [Attempt(1, 1)]), max_size=2))
        return list(dict.fromkeys(late + fit))

    def _is(self, attempt: Attempt, state: State, node: str) -> bool:
        job = self.jobs.get(attempt.job_id)
        return job is not None and (job.state, job.attempt, job.node) == (state, attempt.attempt, node)

    def attempts_end(self, data: st.DataObject) -> None:
        """Any that there ever were, in any way that is legal: whoever is not current changes nothing."""
        name, back, ran = data.draw(st.sampled_from(NAMES)), data.draw(BACK), data.draw(st.booleans())
        before = data.draw(st.sampled_from((State.RUNNING, State.RUNNING, State.CONFIGURING)))
        attempts = self._some(data, before)
        again = st.just(State.PENDING)  # or there would be few second attempts
        after = again | st.sampled_from(sorted(allocations.ends_of(before)))
        endings = [_ending(attempt, data.draw(after), ran) for attempt in attempts]
        place = self.nodes.get(name)
        # A worker ends what it ran; what has not started is ended by whoever, without an incarnation.
        incarnation = (place.incarnation if place else 1) - back if before is State.RUNNING else None
        fit = incarnation is None or (place is not None and back == 0)
        expected = {a for a in attempts if fit and self._is(a, before, name)}
        ended = self.do(allocations.release(self.db, endings, node=name, before=before, incarnation=incarnation))
        assert ended == expected
        for ending in endings:
            if Attempt(ending.job_id, ending.attempt) in expected:
                self._ended(self.jobs[ending.job_id], before, ending)

    def attempts_end_for_good(self, data: st.DataObject) -> None:
        """Any that there ever were, or none; what waits next begins, where a pass could place it, too."""
        name, attempts = data.draw(st.sampled_from(NAMES)), self._some(data, State.RUNNING)
        if attempts and data.draw(st.booleans()):
            name = self.jobs[attempts[-1].job_id].node or name  # or most would be somebody else's
        back, take = data.draw(BACK), data.draw(st.booleans())
        after = st.sampled_from(sorted(allocations.ends_of(State.RUNNING) & FINAL))
        endings = [_ending(attempt, data.draw(after), ran=True) for attempt in attempts]
        place = self.nodes.get(name)
        incarnation = (place.incarnation if place else 1) - back
        fit = place is not None and back == 0
        expected = {a for a in attempts if fit and self._is(a, State.RUNNING, name)}
        turned = self.do(allocations.turn_over(self.db, endings, node=name, incarnation=incarnation, take=take))
        assert turned.ended == expected
        for ending in endings:
            if Attempt(ending.job_id, ending.attempt) in expected:
                self._ended(self.jobs[ending.job_id], State.RUNNING, ending)
        begun = self._next_on(name) if take and fit and (expected or not attempts) else []
        assert sorted((spec.job_id, spec.attempt, spec.restart_cnt) for spec in turned.begun) == [
            (job_id, self.jobs[job_id].attempt + 1, self.jobs[job_id].restarts) for job_id in begun
        ]
        for job_id in begun:
            job = self.jobs[job_id]
            job.state, job.attempt, job.node = State.RUNNING, job.attempt + 1, name
            self.everything.append(Attempt(job_id, job.attempt))
        held = self._held(name)
        assert turned.free_cpus == (max(self.nodes[name].declared - held, 0) if expected or begun else None)
        waits = any(job.state is State.PENDING for job in self.jobs.values())
        assert turned.left_some == (not attempts and waits)
        self._restarts_say_where_they_begin([Attempt(i, self.jobs[i].attempt) for i in begun], name, 0)
        self._restarts_say_where_they_begin(attempts, name, 0)  # too late

    def _next_on(self, name: str) -> list[int]:
        """What waits and is given a node's free CPUs next: until one does not fit that would on the idle rest."""
        room = left = self._free().get(name, 0)
        found = []
        for job_id, job in sorted(self.jobs.items()):
            if job.state is State.PENDING and job.cpus <= room:
                left -= job.cpus
                if left < 0:
                    break
                found.append(job_id)
        return found

    def _ended(self, job: Known, before: State, ending: Ending) -> None:
        if ending.state is not State.PENDING:
            job.state = ending.state
            job.cancelled |= ending.state is State.CANCELLED
        elif job.cancelled:
            job.state = State.CANCELLED
        else:
            job.state, job.node = State.PENDING, None
            job.restarts += before is State.RUNNING and ending.ran

    def a_job_is_cancelled(self, data: st.DataObject) -> None:
        """By each of the two statements, whatever its state: the one that does not fit answers so."""
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        waits, runs = job.state is State.PENDING, job.state is State.RUNNING
        assert self.do(jobs.request_cancel(self.db, Attempt(job_id, job.attempt))) == runs
        assert self.do(jobs.cancel_waiting(self.db, job_id)) == waits
        assert not self.do(jobs.request_cancel(self.db, Attempt(job_id, job.attempt + 1)))
        job.cancelled |= waits or runs
        if waits:
            job.state = State.CANCELLED

    def what_cannot_start_goes_back(self, data: st.DataObject) -> None:
        """Once the lease is over, or the node drains."""
        for dispatch in self.do(allocations.stranded(self.db, 1000)):
            ending = Ending(dispatch.job_id, dispatch.attempt, State.PENDING, Reason.NONE)
            back = self.do(allocations.release(self.db, [ending], node=dispatch.node, before=State.CONFIGURING))
            assert len(back) == 1
            self._ended(self.jobs[dispatch.job_id], State.CONFIGURING, ending)

    # What holds at every moment

    @invariant()
    def nothing_is_broken(self) -> None:
        assert self.do(self.db.fetch(_AUDIT)) == []

    @invariant()
    def what_cannot_start_is_seen(self) -> None:
        out = {name for name, place in self.nodes.items() if place.lease == GONE or place.draining}
        expected = {
            Attempt(job_id, job.attempt)
            for job_id, job in self.jobs.items()
            if job.state is State.CONFIGURING and job.node in out
        }
        stranded = self.do(allocations.stranded(self.db, 1000))
        assert {Attempt(d.job_id, d.attempt) for d in stranded} == expected

    @invariant()
    def everything_is_as_foretold(self) -> None:
        rows = self.do(self.db.fetch(_STATES))
        assert {row["job_id"] for row in rows} == set(self.jobs)
        for row in rows:
            job = self.jobs[row["job_id"]]
            assert (row["state"], row["attempt"], row["restart_cnt"]) == (job.state, job.attempt, job.restarts)
            assert row["cancelled"] == job.cancelled
            if job.state not in FINAL:
                assert row["node"] == job.node
        for name, allocated, cpus in self.do(self.db.fetch(_HELD)):
            held = self._held(name)
            assert (allocated, cpus) == (held, max(self.nodes[name].declared, held))


def _ending(attempt: Attempt, state: State, ran: bool) -> Ending:
    ending = an_ending(attempt, state)
    return Ending(ending.job_id, ending.attempt, state, Reason.NONE, exit_code=ending.exit_code, ran=ran)


PLAY = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def play(server: Server, **changes: Any) -> None:
    """Let things happen on a database."""
    run_state_machine_as_test(type("Life", (Life,), {"server": server}), settings=settings(PLAY, **changes))


def test_whatever_happens_in_whatever_order(server: Server) -> None:
    play(server)


ATTEMPT, INCARNATION = "j.attempt = i.attempt AND ", "AND l.incarnation = $11"
WRONG: list[tuple[ModuleType, str, str, str]] = [
    (allocations, "_RELEASE", ATTEMPT, ""),
    (allocations, "_RELEASE", INCARNATION, "AND $11::bigint IS NOT NULL"),
    (allocations, "_RELEASE", "j.state = $1", "$1 <> ''"),
    (allocations, "_RELEASE", "FROM released GROUP BY node", "FROM released WHERE false GROUP BY node"),
    (allocations, "_RELEASE", "i.state = 'PENDING' AND j.cancel_requested_time IS NOT NULL", "false"),
    (allocations, "_TURN_OVER", "AND j.state = 'RUNNING'", ""),
    (allocations, "_TURN_OVER", "AND $3\n", "AND ($3 OR true)\n"),
    (allocations, "_TURN_OVER", "AND l.incarnation = $2", "AND $2::bigint IS NOT NULL"),
    (allocations, "_TURN_OVER", "WHERE h.fits", ""),
    (allocations, "_TURN_OVER", "coalesce(sum(cpus), 0) FROM changed", "0 FROM changed"),
    (allocations, "_TURN_OVER", "sum(cpus) FROM released", "0 * sum(cpus) FROM released"),
    (allocations, "_PLACE", "attempt = j.attempt + 1", "attempt = greatest(j.attempt, 1)"),
    (allocations, "_STRANDED", "l.draining OR ", ""),
    (jobs, "_START", "incarnation = $4", "$4::bigint IS NOT NULL"),
    (jobs, "_START", "AND NOT draining", ""),
    (jobs, "_START", "AND j.attempt = i.attempt", ""),
    (jobs, "_CANCEL_WAITING", "AND state = 'PENDING'", ""),
    (jobs, "_REQUEST_CANCEL", "AND attempt = $2", "AND $2 > 0"),
    (outputs, "_STORE", "AND l.incarnation = $7", "AND $7::bigint IS NOT NULL"),
    (outputs, "_STORE", "j.state = 'RUNNING' AND ", ""),
    (nodes, "_HEARTBEAT", "AND incarnation = $2", "AND $2 >= 0"),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("module", "name", "old", "new"), WRONG, ids=[f"{w[1]}: {w[2]}" for w in WRONG])
def test_what_is_wrong_is_found(
    server: Server, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, old: str, new: str
) -> None:
    text = getattr(module, name)
    assert old in text
    monkeypatch.setattr(module, name, text.replace(old, new))
    with pytest.raises((AssertionError, asyncpg.PostgresError)):
        play(server, max_examples=1500, phases=[Phase.generate], database=None, derandomize=True)
