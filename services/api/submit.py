"""Storing submissions: everything that piled up goes in by one statement, in one transaction."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import asyncpg
import structlog

from core.batch import Batcher
from core.db import jobs, nodes
from core.errors import Unavailable
from core.records import Job, NewJob
from core.states import Reason, State
from core.wakeup import Wakeup
from services.api.database import Database
from services.api.problems import Fault, Problem, unprocessable

BATCH = 500
# Characters in one statement: more is held several times over on its way, and might outlast the statement's time.
PART = 8 * 1024 * 1024

# What says that a value does not fit, and not that the server is away. The models should have found it.
MISFITS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError)


class Submitter:
    """Stores submissions in batches; sets `wake` after each commit."""

    def __init__(self, database: Database, wake: Wakeup) -> None:
        self._database = database
        self._wake = wake
        self._batcher: Batcher[NewJob, Job] = Batcher(self._store, BATCH)

    async def run(self) -> None:
        """Work until cancelled."""
        await self._batcher.run()

    async def submit(self, job: NewJob) -> Job:
        """The job as stored, after the commit. Raises Problem when it fits no node, and Unavailable."""
        return await self._batcher.do(job)

    async def _store(self, batch: Sequence[NewJob]) -> list[Job | Exception]:
        return [result for part in parts(batch) for result in await self._store_part(part)]

    async def _store_part(self, part: Sequence[NewJob]) -> list[Job | Exception]:
        try:
            return await self._store_together(part)
        except Unavailable as error:
            return [error] * len(part)
        except MISFITS as error:
            if len(part) == 1:
                return [_misfit(error)]
        return [result for job in part for result in await self._store_part([job])]

    async def _store_together(self, batch: Sequence[NewJob]) -> list[Job | Exception]:
        sent = False
        try:
            async with self._database.store() as connection:
                sent = True
                stored = await jobs.insert(connection, batch)
                sent = False
                largest = await nodes.largest_by_partition(connection) if None in stored else {}
        except Unavailable as error:
            if sent:  # whether the COMMIT arrived is not known, and the client must not be told that it did
                raise Unavailable(f"{error}; the job may have been stored: look before you post it again") from error
            raise
        self._wake.set()
        return [await self._answer(job, row, largest) for job, row in zip(batch, stored, strict=True)]

    async def _answer(
        self, job: NewJob, row: tuple[int, datetime] | None, largest: Mapping[str, int]
    ) -> Job | Exception:
        if row is not None:
            return _stored(job, *row)
        # No reason any more: a node where it fits has registered in between.
        return refusal(job, largest) or (await self._store_together([job]))[0]


def parts(batch: Sequence[NewJob]) -> Iterator[Sequence[NewJob]]:
    """The batch in order, cut where a part would hold more than PART characters of text."""
    start, held = 0, 0
    for index, job in enumerate(batch):
        size = len(job.script) + sum(len(name) + len(value) for name, value in job.environment.items())
        if index > start and held + size > PART:
            yield batch[start:index]
            start, held = index, 0
        held += size
    yield batch[start:]


def _misfit(error: Exception) -> Problem:
    structlog.get_logger().warning("submission_refused_by_database", error=type(error).__name__)
    return Problem(422, f"the database refuses a value of this job ({type(error).__name__})")


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


def _stored(job: NewJob, job_id: int, submit_time: datetime) -> Job:
    """What a SELECT would answer, without it."""
    return Job(
        job_id=job_id,
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
        submit_time=submit_time,
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
