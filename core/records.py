"""The values that travel between the roles: frozen, slotted, no behaviour that could wait."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from core.states import State


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated submission, as the API hands it to the database.

    Memory is MiB, the time limit whole seconds (None: none).
    """

    name: str
    account: str
    partition: str
    tasks: int
    cpus_per_task: int
    memory_mib: int | None
    time_limit_seconds: int | None
    requeue: bool
    script: str
    environment: Mapping[str, str]
    current_working_directory: str | None
    standard_output: str
    standard_error: str | None
    comment: str | None
    cpus_per_task_given: bool
    tasks_per_node_given: bool
    key: str | None = None
    """Its Idempotency-Key: of its account, and for as long as the job."""
    digest: bytes | None = None
    """With a key: what tells whether another submission under it asks for the same job."""

    @property
    def cpus(self) -> int:
        """The CPUs that the job takes on its one node."""
        return self.tasks * self.cpus_per_task


@dataclass(frozen=True, slots=True)
class Job:
    """A job as stored: its hot row with the paths of its specification."""

    job_id: int
    state: State
    state_reason: str
    state_description: str | None
    attempt: int
    restart_cnt: int
    name: str
    account: str
    partition: str
    tasks: int
    cpus_per_task: int
    cpus: int
    memory_mib: int | None
    time_limit_seconds: int | None
    requeue: bool
    node: str | None
    incarnation: int | None
    """Of the worker that started the current attempt."""
    submit_time: datetime
    allocate_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    cancel_requested_time: datetime | None
    exit_code: int | None
    signal: str | None
    current_working_directory: str | None
    standard_output: str
    standard_error: str | None
    comment: str | None
    work_base_dir: str | None
    """JOB_WORK_BASE_DIR of the job's node, where relative paths lie; None before it has one, or once it is deleted."""
    job_user: str | None
    """The Unix user that jobs of that node run as; None in the same cases."""
    node_unreachable: bool = False
    """Whether it is RUNNING on a node whose lease is over: how it fares, nobody knows until that is back."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One allocation of one job; what every write of a worker is fenced by."""

    job_id: int
    attempt: int


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a worker needs to run an attempt that it has just moved to RUNNING."""

    job_id: int
    attempt: int
    restart_cnt: int
    name: str
    account: str
    partition: str
    tasks: int
    cpus_per_task: int
    cpus: int
    memory_mib: int | None
    time_limit_seconds: int | None
    requeue: bool
    start_time: datetime
    script: str
    environment: Mapping[str, str]
    current_working_directory: str | None
    standard_output: str
    standard_error: str | None
    cpus_per_task_given: bool
    tasks_per_node_given: bool
    ours: bool = True
    """Whether the worker's own spool started it, so that the spool knows what became of it."""
    incarnation: int = 0
    """Of the worker that started it, for one that another worker finds."""
    cancel_requested: bool = False
    """Whether its cancel was requested before it was found RUNNING."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where the output of a restart begins in its files, in bytes; None where there is no such file yet."""

    job_id: int
    attempt: int
    restart_cnt: int
    stdout_begin: int | None
    stderr_begin: int | None


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, as its worker reports it. At most one of `exit_code` and `signal` is set."""

    job_id: int
    attempt: int
    state: State
    reason: str
    description: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    ran: bool = True
    """Whether its script was started; matters to one that goes back to PENDING: its next start is a restart."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """A node that may be given work now."""

    name: str
    partitions: frozenset[str]
    free_cpus: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits."""

    job_id: int
    partition: str
    cpus: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision to give a job `cpus` CPUs of a node."""

    job_id: int
    node: str
    cpus: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """An allocated attempt on its way to its node."""

    job_id: int
    attempt: int
    node: str


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a worker registers of its node. Memory is MiB."""

    name: str
    partitions: tuple[str, ...]
    cpus: int
    memory_mib: int
    work_base_dir: str
    job_user: str
    spool_id: str
    hostname: str
    address: str
    secret: str
    version: str
    grace_seconds: float
    requeue_after_seconds: float


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a node's lease."""

    hostname: str
    spool_id: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node as clients see it."""

    name: str
    partitions: tuple[str, ...]
    cpus: int
    declared_cpus: int
    alloc_cpus: int
    memory_mib: int
    admin_state: str
    admin_reason: str | None
    admin_by: str | None
    admin_time: datetime | None
    registered_time: datetime
    alive: bool
    draining: bool
    hostname: str | None
    address: str | None
    heartbeat_time: datetime | None
    incarnation: int | None
    version: str | None
    cpu_load: float | None
    stale_writes_refused: int
