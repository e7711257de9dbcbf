"""Where an output lies, and its worker, which is asked for it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import structlog
from aiohttp import web

from core.attempts import as_of
from core.db import nodes, outputs
from core.db.connection import Connection
from core.records import Job
from services.api import rendering, state
from services.api.listing import Excerpt
from services.api.models import NULL_DEVICE
from services.api.problems import Fault, Problem, unavailable, unprocessable


@dataclass(frozen=True, slots=True)
class Source:
    """Whose output it is, in which attempt, and who has it."""

    job: Job
    address: str
    secret: str


async def find(connection: Connection, job: Job, excerpt: Excerpt) -> Source | None:
    """Where an output lies; None when there is none. Or Problem: 422, 410 when its node was deleted, 503."""
    of_attempt = await _in_attempt(connection, job, excerpt.attempt)
    if of_attempt is None or of_attempt.start_time is None or of_attempt.node is None:
        return None
    if goes_nowhere(of_attempt, excerpt.stream):
        return None
    if of_attempt.work_base_dir is None:
        raise Problem(410, f"node {of_attempt.node}, which had the output, was deleted")
    server = await nodes.file_server(connection, of_attempt.node)
    if server is None:
        raise unavailable(f"node {of_attempt.node}, which has the output, is down: its worker's lease is over")
    return Source(of_attempt, *server)


async def _in_attempt(connection: Connection, job: Job, attempt: int | None) -> Job | None:
    """The job as it was in the attempt asked for, if one is; None when that was never started. Or Problem 422."""
    if attempt is None:
        return job
    if attempt > job.attempt:
        last = f"{job.attempt}, the last attempt of job {job.job_id}"
        right = f"should be at most {last}" if job.attempt else f"job {job.job_id} has had no attempt yet: leave it out"
        raise unprocessable([Fault(right, parameter="attempt")])
    return as_of(job, await outputs.starts(connection, job.job_id), attempt)


def goes_nowhere(job: Job, stream: str) -> bool:
    """Whether it is written to the null device."""
    paths = rendering.paths_of(job)
    if paths is None:
        return False
    path = paths.standard_output if stream == "stdout" else paths.standard_error
    return path == NULL_DEVICE


@asynccontextmanager
async def ask(
    request: web.Request, source: Source, excerpt: Excerpt, headers: Mapping[str, str], timeout: aiohttp.ClientTimeout
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The worker's answer, which is good. Raises Problem, also for its connection's errors that leave the block."""
    job = source.job
    wanted = {
        "offset": excerpt.offset,
        "tail": excerpt.tail,
        "alone": None if excerpt.attempt is None else 1,
        "follow": 1 if excerpt.follow else None,
    }
    try:
        async with state.of(request).workers.request(
            request.method,
            f"{source.address}/logs/{job.job_id}/{job.attempt}/{excerpt.stream}",
            params={name: str(value) for name, value in wanted.items() if value is not None},
            headers={"Authorization": f"Bearer {source.secret}", **headers},
            timeout=timeout,
            allow_redirects=False,
        ) as answer:
            _check(answer, job)
            yield answer
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: an address that is none
        structlog.get_logger().warning("worker_unreachable", node=job.node, address=source.address, error=str(error))
        raise unavailable(f"node {job.node}, which has the output, cannot be reached now") from None


def _check(answer: aiohttp.ClientResponse, job: Job) -> None:
    if answer.status in (200, 206):
        return
    if answer.status == 416:
        range_ = {name: answer.headers[name] for name in ("Content-Range",) if name in answer.headers}
        raise Problem(416, "the output does not reach that far", headers=range_)
    if answer.status == 404:
        raise Problem(404, f"node {job.node} has no such output of job {job.job_id}: removed, or no regular file")
    raise unavailable(f"node {job.node}, which has the output, answered {answer.status}")  # 401: it just restarted
