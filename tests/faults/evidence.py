"""What is known of a run: what its clients did and saw, what scripts wrote, and what the database says."""

from dataclasses import dataclass, field

import asyncpg

from core.db.audit import Broken, audit
from core.records import Attempt
from tests.faults.jobs import Wanted
from tests.faults.ledger import Line

# State, exit code and signal, as clients see them together.
End = tuple[str, int | None, str | None]


@dataclass(frozen=True, slots=True)
class Cancel:
    """A cancel that was answered with 2xx: what the job was then, and where the ledger ended."""

    state: str
    attempt: int
    at: int


@dataclass(slots=True)
class Sent:
    """A submission, as its client knows it. Its key is its job's name."""

    wanted: Wanted
    job_ids: set[int] = field(default_factory=set)
    """What 2xx answers said; more than one is a job too many."""
    refused: str | None = None
    cancels: list[Cancel] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    """Every final state that was read, in order."""
    output: bytes | None = None
    """What was served of its output once it was over."""
    alone: dict[int, bytes | None] = field(default_factory=dict)
    """What was served of each attempt's alone."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.wanted.name


@dataclass(frozen=True, slots=True)
class Row:
    """A job as the database has it."""

    job_id: int
    name: str
    state: str
    attempt: int
    restart_cnt: int
    requeue: bool
    cpus: int
    node: str | None
    exit_code: int | None
    signal: str | None
    time_limit_seconds: int | None
    final: bool
    script: str

    @property
    def end(self) -> End:
        """As clients see it."""
        return self.state, self.exit_code, self.signal


@dataclass(frozen=True, slots=True)
class Event:
    """A committed transition; times are seconds since the epoch."""

    attempt: Attempt
    before: str | None
    after: str
    node: str | None
    time: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A time in which a node could lose what it ran, or some of it: whoever would have told the exit was killed."""

    node: str
    began: float
    ended: float
    attempts: frozenset[Attempt] | None = None
    """What could be lost; None: whatever ran there."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A time from the end of a node's lease to when its worker could be heard again."""

    node: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Sighting:
    """A process of a job that was over when it was seen."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the invariants are held against."""

    sent: list[Sent]
    lines: list[Line]
    rows: dict[int, Row]
    events: list[Event]
    cpus: dict[str, int]
    """The CPUs of each node."""
    outputs: dict[int, bytes] = field(default_factory=dict)
    """What lies on disk of each job's output, where it was looked at."""
    losses: list[Loss] = field(default_factory=list)
    silences: list[Silence] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    audited: list[Broken] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Roles that ended by themselves, and other things that nobody expected."""
    over: int = 0
    """The most CPUs over its own that a look at the database found allocated on a node."""


_ROWS = """
SELECT j.job_id, j.name, j.state, j.attempt, j.restart_cnt, j.requeue, j.cpus, j.node, j.exit_code, j.signal,
       j.time_limit_seconds, j.end_time IS NOT NULL AS final, s.script
FROM jobs j JOIN job_specs s USING (job_id)
"""

_EVENTS = """
SELECT job_id, attempt, from_state, to_state, node, extract(epoch FROM time)::float8 AS time
FROM job_events ORDER BY seq
"""


async def stored(connection: asyncpg.Connection) -> tuple[dict[int, Row], list[Event], list[Broken]]:
    """What the database says of the jobs, and what its own audit finds."""
    rows = {row["job_id"]: Row(**row) for row in await connection.fetch(_ROWS)}
    events = [
        Event(Attempt(row["job_id"], row["attempt"]), row["from_state"], row["to_state"], row["node"], row["time"])
        for row in await connection.fetch(_EVENTS)
    ]
    return rows, events, await audit(connection)
