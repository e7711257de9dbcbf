"""``GET /jobs/{job_id}/logs``: the worker serves its node's files, the API passes them on."""

import re

import aiohttp
import structlog
from aiohttp import web

from core.attempts import as_of
from core.db import jobs, nodes, outputs
from core.db.connection import Connection
from core.records import Job
from services.api import rendering, state
from services.api.jobs import found, job_id_of
from services.api.listing import Excerpt, read_excerpt
from services.api.models import NULL_DEVICE
from services.api.problems import Fault, Problem, unavailable, unprocessable

CHUNK = 256 * 1024
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30)
# Anything else (RFC 9110, 14.2) is ignored, and the whole output answered.
RANGE = re.compile(r"bytes=(?:[0-9]+-[0-9]*|-[0-9]+)", re.ASCII | re.IGNORECASE)
PASSED_ON = ("Content-Length", "Content-Range", "Accept-Ranges")
HEADERS = {"Content-Type": "text/plain; charset=utf-8"}


async def get_logs(request: web.Request) -> web.StreamResponse:
    """The output where a job's last attempt wrote it, or the bytes of one attempt, as written, also while it runs."""
    api, job_id = state.of(request), job_id_of(request)
    asked = range_of(request)
    excerpt = read_excerpt(request.query, ranged=asked is not None)
    async with api.database.connection() as connection:
        job = await _in_attempt(connection, found(await jobs.get(connection, job_id), job_id), excerpt.attempt)
        if job is None or job.start_time is None or job.node is None or _goes_nowhere(job, excerpt.stream):
            return web.Response(body=b"", headers={**HEADERS, "Accept-Ranges": "bytes"})
        if job.work_base_dir is None:
            raise Problem(410, f"node {job.node}, which had the output, was deleted")
        server = await nodes.file_server(connection, job.node)
    if server is None:
        raise unavailable(f"node {job.node}, which has the output, is down: its worker's lease is over")
    return await _pass_on(request, job, excerpt, asked, *server)


async def _in_attempt(connection: Connection, job: Job, attempt: int | None) -> Job | None:
    """The job as it was in the attempt asked for, if one is; None when that was never started. Or Problem 422."""
    if attempt is None:
        return job
    if attempt > job.attempt:
        last = f"{job.attempt}, the last attempt of job {job.job_id}"
        right = f"should be at most {last}" if job.attempt else f"job {job.job_id} has had no attempt yet: leave it out"
        raise unprocessable([Fault(right, parameter="attempt")])
    return as_of(job, await outputs.starts(connection, job.job_id), attempt)


def range_of(request: web.Request) -> str | None:
    """The one range of bytes that is asked for, if any. There are no validators that an If-Range could match."""
    ranges = request.headers.getall("Range", [])
    return ranges[0] if len(ranges) == 1 and RANGE.fullmatch(ranges[0]) and "If-Range" not in request.headers else None


def _goes_nowhere(job: Job, stream: str) -> bool:
    paths = rendering.paths_of(job)
    if paths is None:
        return False
    path = paths.standard_output if stream == "stdout" else paths.standard_error
    return path == NULL_DEVICE


async def _pass_on(
    request: web.Request, job: Job, excerpt: Excerpt, asked: str | None, address: str, secret: str
) -> web.StreamResponse:
    headers = {"Authorization": f"Bearer {secret}", **({"Range": asked} if asked else {})}
    wanted = {"offset": excerpt.offset, "tail": excerpt.tail, "alone": None if excerpt.attempt is None else 1}
    try:
        async with state.of(request).workers.request(
            request.method,
            f"{address}/logs/{job.job_id}/{job.attempt}/{excerpt.stream}",
            params={name: str(value) for name, value in wanted.items() if value is not None},
            headers=headers,
            timeout=TIMEOUT,
            allow_redirects=False,
        ) as answer:
            _check(answer, job)
            return await _stream(request, answer)
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: an address that is none
        structlog.get_logger().warning("worker_unreachable", node=job.node, address=address, error=str(error))
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


async def _stream(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    passed = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
    response = web.StreamResponse(status=answer.status, headers={**HEADERS, **passed})
    try:
        await response.prepare(request)
        if request.method != "HEAD":
            async for chunk in answer.content.iter_chunked(CHUNK):
                await response.write(chunk)
        await response.write_eof()
    except (aiohttp.ClientError, OSError):
        # Too late for another answer: cut the connection, so that the client sees that bytes are missing.
        if request.transport is not None:
            request.transport.abort()
    return response
