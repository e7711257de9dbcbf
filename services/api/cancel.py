"""Cancelling: compare-and-sets against a job that moves on, until one applies or the job is over."""

import asyncio

import asyncpg
import structlog
from aiohttp import web

from core import crash, streams
from core.db import allocations, jobs
from core.db.connection import Connection, describe
from core.errors import Unavailable
from core.records import Attempt, Dispatch, Ending, Job
from core.states import FINAL, Reason, State
from services.api import guard, rendering, state, strict_json
from services.api.jobs import found, job_id_of
from services.api.models import pointer
from services.api.problems import MAX_FAULTS, Fault, unprocessable

# A job moves a few times in its life, so this many looks only fail when something is wrong.
LOOKS = 20
HINT_SECONDS = 1

# The statement as a whole is done again.
CONFLICTS = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


async def cancel_job(request: web.Request) -> web.Response:
    """``DELETE /jobs/{job_id}``, ``POST …/cancel``: 200 when the job is over, 202 when it is being ended."""
    if request.method == "POST":
        await _check_body(request)
    api, job_id = state.of(request), job_id_of(request)
    job = await _cancel(api, job_id)
    crash.here("api.cancelled")
    if job.state in FINAL:
        api.moves.add(job.job_id, job.state)
    else:
        await hint(api, Dispatch(job.job_id, job.attempt, job.node or ""))
    return rendering.answer(rendering.job_document(job), 200 if job.state in FINAL else 202)


async def _check_body(request: web.Request) -> None:
    """There is nothing to say in a cancel: no body, or an empty object."""
    body = await guard.body_of(request)
    if not body:
        return
    guard.check_json(request)
    document = strict_json.parse(body)
    if not isinstance(document, dict):
        raise unprocessable([Fault("should be an object", "")])
    if document:
        names = list(document)[:MAX_FAULTS]
        raise unprocessable([Fault("a cancel takes no fields", pointer((name,))) for name in names])


async def _cancel(api: state.State, job_id: int) -> Job:
    """Cancel the job; answer it as it is then."""
    for _ in range(LOOKS):
        async with api.database.connection() as connection:
            job = found(await jobs.get(connection, job_id), job_id)
            if job.state in FINAL or (job.state is State.RUNNING and job.cancel_requested_time is not None):
                return job
            try:
                await _move(connection, job)
            except CONFLICTS:
                continue
        if job.state is State.CONFIGURING:
            api.wake.set()  # CPUs came back
    raise Unavailable(f"job {job_id} moves faster than it can be cancelled")


async def _move(connection: Connection, job: Job) -> None:
    """One compare-and-set, a transaction of its own. That it does not apply is seen by the next look."""
    attempt = Attempt(job.job_id, job.attempt)
    async with connection.transaction():
        match job.state:
            case State.PENDING:
                await jobs.cancel_waiting(connection, job.job_id)
            case State.CONFIGURING:
                ending = Ending(job.job_id, job.attempt, State.CANCELLED, Reason.NONE)
                await allocations.release(connection, [ending], node=job.node or "", before=State.CONFIGURING)
            case _:
                await jobs.request_cancel(connection, attempt)


async def hint(api: state.State, dispatch: Dispatch) -> None:
    """Tell the worker; it looks at the table anyway, so Redis being away costs time only."""
    try:
        async with asyncio.timeout(HINT_SECONDS):
            await streams.publish(api.link, "cancel", [dispatch])
    except streams.REDIS_ERRORS as error:
        structlog.get_logger().warning("cancel_not_published", job_id=dispatch.job_id, error=describe(error))
