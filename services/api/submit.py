"""Storing submissions: everything that piled up goes in by one statement, in one transaction."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

import asyncpg
import structlog

from core import crash
from core.batch import Batcher
from core.db import jobs, nodes
from core.db.connection import RETRY_SECONDS, Connection, end_backend, is_refusal
from core.errors import Unavailable
from core.records import Job, NewJob
from core.states import Reason, State
from core.wakeup import Wakeup
from services.api.database import Database
from services.api.idempotency import HEADER, is_same
from services.api.lists import turn
from services.api.problems import MAX_FAULTS, Fault, Problem, unprocessable, within

BATCH = 500
# Characters in one statement: more is held several times over on its way, and might outlast the statement's time.
PART = 8 * 1024 * 1024
PART_JOBS = 1000
# For how long an insert whose answer was lost is looked for; the next submissions wait for it.
SETTLE_SECONDS = 10
LOOK_FIRST = "look before you post again, or use an Idempotency-Key"

# What says that a value does not fit, and not that the server is away. The models should have found it.
MISFITS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that is stored, by this very submission or by an earlier one under the same key."""

    job: Job
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class AcceptedList:
    """A list of jobs that are stored, in its order, by this very submission or by an earlier one under the same key."""

    job_ids: list[int]
    replayed: bool = False


Connect = Callable[[], AbstractAsyncContextManager[Connection]]
Insert = Callable[[Connection, Sequence[NewJob], int], Awaitable[list[jobs.Stored | None]]]
"""Stores jobs under a number by which they are found again; None for each that is not stored."""


class Submitter:
    """Stores submissions in batches; after each commit it sets `wake`, or calls the node that has room for its one."""

    def __init__(self, database: Database, wake: Wakeup, call: Callable[[int, str], None]) -> None:
        self._database = database
        self._wake, self._call = wake, call
        self._batcher: Batcher[NewJob, Accepted] = Batcher(self._store, BATCH)
        self._lists = asyncio.Lock()  # around all use of the connection for them

    async def run(self) -> None:
        """Work until cancelled."""
        await self._batcher.run()

    async def submit(self, job: NewJob) -> Accepted:
        """The job as stored, after the commit.

        Raises Unavailable, and Problem when it fits no node or its key stands for another job.
        """
        return await self._batcher.do(job)

    async def submit_all(self, batch: Sequence[NewJob]) -> AcceptedList:
        """The jobs as stored, all of them in one commit, or none. A key is the first one's. Raises as `submit` does."""
        async with turn(self._lists, "other lists of jobs"):
            if (kept := await self._kept(batch)) is not None:
                return kept
            crash.here("api.read")
            try:
                stored = await self._insert(batch, self._database.lists, _insert_all)
            except MISFITS as error:
                raise _misfit(error, "one of these jobs") from None
            crash.here("api.stored")
            if all(stored):
                self._wake.set()
                return AcceptedList([row.job_id for row in stored if row is not None])
            if any(stored):  # its answer was lost, and NEWEST others have come since it began
                raise Unavailable(f"the jobs were stored, and not all are found: {LOOK_FIRST}")
            if (kept := await self._kept(batch)) is not None:  # somebody was faster, by a moment
                return kept
            raise Unavailable("nodes where all of these jobs fit have just registered: post them again")

    async def _kept(self, batch: Sequence[NewJob]) -> AcceptedList | None:
        """What is stored under the list's key, if anything is. Problem when that, or a size, keeps the list out."""
        async with self._database.lists() as connection:
            if (kept := await _replayed(connection, batch)) is None:
                await _check_sizes(connection, batch)
        return kept

    async def _store(self, batch: Sequence[NewJob]) -> list[Accepted | Exception]:
        return [result for part in parts(batch) for result in await self._store_part(part)]

    async def _store_part(self, part: Sequence[NewJob]) -> list[Accepted | Exception]:
        try:
            return await self._store_together(part)
        except Unavailable as error:
            return [error] * len(part)
        except MISFITS as error:
            if len(part) == 1:
                return [_misfit(error)]
        return [result for job in part for result in await self._store_part([job])]

    async def _store_together(self, batch: Sequence[NewJob]) -> list[Accepted | Exception]:
        crash.here("api.read")
        stored = await self._insert(batch, self._database.store, jobs.insert)
        crash.here("api.stored")
        if stored[0] is not None and stored[0].room is not None:
            self._call(stored[0].job_id, stored[0].room)
        else:
            self._wake.set()
        left = [job for job, row in zip(batch, stored, strict=True) if row is None]
        others = iter(await self._why_not(left) if left else ())
        return [
            next(others) if row is None else Accepted(_stored(job, row)) for job, row in zip(batch, stored, strict=True)
        ]

    async def _insert(self, batch: Sequence[NewJob], connect: Connect, insert: Insert) -> list[jobs.Stored | None]:
        """Insert; when the answer is lost, find out whether that was done, and do it again when it was not."""
        deadline: float | None = None
        while True:
            backend, submission = None, secrets.randbits(62)
            try:
                async with connect() as connection:
                    backend = connection.get_server_pid()
                    return await insert(connection, batch, submission)
            except Unavailable as error:
                if backend is None or is_refusal(error.__cause__):
                    raise
                deadline = deadline or asyncio.get_running_loop().time() + SETTLE_SECONDS
                try:
                    async with asyncio.timeout_at(deadline):
                        stored = await self._found(connect, backend, submission, len(batch))
                except TimeoutError:
                    raise Unavailable(f"{error}; it may have been stored: {LOOK_FIRST}") from error
            if any(stored):
                return stored

    async def _found(self, connect: Connect, backend: int, submission: int, count: int) -> list[jobs.Stored | None]:
        """What an insert has stored whose answer was lost, once PostgreSQL is there to be asked."""
        while True:
            with suppress(Unavailable):
                async with connect() as connection:
                    if await end_backend(connection, backend, RETRY_SECONDS):
                        return await jobs.stored_by(connection, submission, count)
            await asyncio.sleep(RETRY_SECONDS)

    async def _why_not(self, batch: Sequence[NewJob]) -> list[Accepted | Exception]:
        """The answers to submissions of which nothing was stored."""
        try:
            async with self._database.store() as connection:
                keyed = [job for job in batch if job.key is not None]
                kept = await jobs.by_keys(connection, keyed) if keyed else {}
                largest = await nodes.largest_by_partition(connection) if len(kept) < len(batch) else {}
        except Unavailable as error:
            return [error] * len(batch)
        return [why_not(job, kept, largest) for job in batch]


class _NotAll(Exception):
    """Takes the transaction back."""


async def _insert_all(connection: Connection, batch: Sequence[NewJob], submission: int) -> list[jobs.Stored | None]:
    found: list[jobs.Stored | None] = []
    with suppress(_NotAll):
        async with connection.transaction():
            for part in parts(batch):
                found += await jobs.insert(connection, part, submission + len(found))
                if None in found:
                    raise _NotAll
        return found
    return [None] * len(batch)


async def _replayed(connection: Connection, batch: Sequence[NewJob]) -> AcceptedList | None:
    """What is stored under the list's key, if anything is; Problem when that is something else."""
    first = batch[0]
    kept = {} if first.key is None else await jobs.by_keys(connection, [first])
    if (found := kept.get((first.account, first.key or ""))) is None:
        return None
    digest, job = found
    ids = await jobs.of_list(connection, job.job_id, len(batch)) if digest == first.digest else []
    if len(ids) != len(batch):
        raise taken(first, job)
    return AcceptedList(ids, replayed=True)


async def _check_sizes(connection: Connection, batch: Sequence[NewJob]) -> None:
    """Problem for those that no node could ever run; where there are many, the first of them."""
    largest = await nodes.largest_by_partition(connection)
    faults: list[Fault] = []
    for number, job in enumerate(batch):
        if (refused := refusal(job, largest)) is not None:
            faults += within(number, refused.faults)
        if len(faults) > MAX_FAULTS:
            break
    if faults:
        raise unprocessable(faults)


def why_not(
    job: NewJob, kept: Mapping[tuple[str, str], tuple[bytes, Job]], largest: Mapping[str, int]
) -> Accepted | Exception:
    """The answer to a submission that was not stored: the job that has its key, or why it cannot be."""
    if job.key is not None and (found := kept.get((job.account, job.key))) is not None:
        return replay(job, *found)
    return refusal(job, largest) or Unavailable("a node where this job fits has just registered: post it again")


def replay(job: NewJob, digest: bytes, found: Job) -> Accepted | Problem:
    """The answer to a submission whose key is taken."""
    if job.digest is not None and is_same(digest, job.digest):
        return Accepted(found, replayed=True)
    return taken(job, found)


def taken(job: NewJob, found: Job) -> Problem:
    """What a submission is answered whose key stands for something else."""
    return Problem(
        422, f"{HEADER} {job.key} of account {job.account} stands for another job, {found.job_id}: use a key once"
    )


def parts(batch: Sequence[NewJob]) -> Iterator[Sequence[NewJob]]:
    """The batch in order, cut where a part would hold more than PART characters of text, or than PART_JOBS."""
    start, held = 0, 0
    for index, job in enumerate(batch):
        size = _size(job)
        if index > start and (held + size > PART or index - start == PART_JOBS):
            yield batch[start:index]
            start, held = index, 0
        held += size
    yield batch[start:]


def _size(job: NewJob) -> int:
    """Characters of the texts that may be long."""
    texts = (job.script, job.comment, job.current_working_directory, job.standard_output, job.standard_error)
    return sum(len(text or "") for text in texts) + sum(len(k) + len(v) for k, v in job.environment.items())


def _misfit(error: Exception, whose: str = "this job") -> Problem:
    structlog.get_logger().warning("submission_refused_by_database", error=type(error).__name__)
    return Problem(422, f"the database refuses a value of {whose} ({type(error).__name__})")


def refusal(job: NewJob, largest: Mapping[str, int]) -> Problem | None:
    """Why no registered node could ever run the job; `largest` has the most CPUs of a node by partition.

    While no node is registered, nothing is refused.
    """
    if not largest:
        return None
    if job.partition not in largest:
        known = ", ".join(sorted(largest))
        return unprocessable([Fault(f"unknown partition; there is {known}", "/job/partition")])
    most = largest[job.partition]
    if job.cpus <= most:
        return None
    field = "cpus_per_task" if job.cpus_per_task > 1 or job.tasks == 1 else "tasks"
    return unprocessable(
        [
            Fault(
                f"{job.cpus} CPUs on one node; the largest node of partition {job.partition} has {most}",
                f"/job/{field}",
            )
        ]
    )


def _stored(job: NewJob, row: jobs.Stored) -> Job:
    """What a SELECT would answer, without it."""
    return Job(
        job_id=row.job_id,
        state=State.PENDING,
        state_reason=Reason.NONE.value,
        state_description=None,
        attempt=0,
        restart_cnt=0,
        name=job.name,
        account=job.account,
        partition=job.partition,
        tasks=job.tasks,
        cpus_per_task=job.cpus_per_task,
        cpus=job.cpus,
        memory_mib=job.memory_mib,
        time_limit_seconds=job.time_limit_seconds,
        requeue=job.requeue,
        node=None,
        incarnation=None,
        submit_time=row.submit_time,
        allocate_time=None,
        start_time=None,
        end_time=None,
        cancel_requested_time=None,
        exit_code=None,
        signal=None,
        current_working_directory=job.current_working_directory,
        standard_output=job.standard_output,
        standard_error=job.standard_error,
        comment=job.comment,
        work_base_dir=None,
        job_user=None,
    )
