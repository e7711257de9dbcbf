"""The JSON of the HTTP API, as types: what the API renders and what its clients read."""

import sys
from typing import NotRequired

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # what pydantic reads there
    from typing_extensions import TypedDict


class JobDocument(TypedDict):
    """A job, with the names of Slurm's job info. Times are RFC 3339 in UTC, memory is MiB.

    Paths are absolute once the job has a node, and as requested before, and once that node is deleted.
    """

    job_id: int
    name: str
    account: str
    partition: str
    state: str
    state_reason: str
    state_description: str | None
    tasks: int
    cpus_per_task: int
    tasks_per_node: int
    cpus: int
    memory_per_node: int | None
    time_limit: str
    time_limit_seconds: int | None
    requeue: bool
    nodes: list[str]
    batch_host: str | None
    node_unreachable: bool
    attempt: int
    restart_cnt: int
    submit_time: str
    allocate_time: str | None
    start_time: str | None
    end_time: str | None
    cancel_requested_time: str | None
    exit_code: int | None
    signal: str | None
    current_working_directory: str | None
    standard_output: str
    standard_error: str | None
    comment: str | None


class JobsDocument(TypedDict):
    """A page of jobs; `next_cursor` is null on the last one."""

    jobs: list[JobDocument]
    next_cursor: str | None


class SubmittedJob(TypedDict):
    """A job of a list that was submitted."""

    job_id: int


class SubmittedDocument(TypedDict):
    """The jobs of a list, in its order."""

    jobs: list[SubmittedJob]


class NodeDocument(TypedDict):
    """A node, with the names of Slurm's node info.

    Who changed its administrative state last, and when, also where that left no reason. The refused writes are those
    of attempts that were not its own any more, since its worker registered.
    """

    name: str
    hostname: str | None
    address: str | None
    state: str
    state_flags: list[str]
    reason: str | None
    reason_set_by_user: str | None
    reason_changed_at: str | None
    partitions: list[str]
    cpus: int
    alloc_cpus: int
    alloc_idle_cpus: int
    cpu_load: float | None
    real_memory: int
    version: str | None
    registered_time: str
    heartbeat_time: str | None
    stale_writes_refused: int


class NodesDocument(TypedDict):
    """Every node, by name."""

    nodes: list[NodeDocument]


class HealthDocument(TypedDict):
    """That all is well."""

    status: str
    service: str
    version: str


class RootDocument(TypedDict):
    """What this is, and where to go on."""

    service: str
    version: str
    links: dict[str, str]


class FaultDocument(TypedDict):
    """One thing that is wrong: `pointer` (RFC 6901) says where in the body, `parameter` in the query."""

    pointer: NotRequired[str]
    parameter: NotRequired[str]
    detail: str


class ProblemDocument(TypedDict):
    """A problem (RFC 9457) with everything that is wrong at once."""

    type: str
    title: str
    status: int
    detail: str
    errors: NotRequired[list[FaultDocument]]
