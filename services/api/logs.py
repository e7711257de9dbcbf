"""``GET /jobs/{job_id}/logs``: the worker serves its node's files, the API passes them on."""

import re

import aiohttp
from aiohttp import web

from core.db import jobs
from services.api import state
from services.api.follow import follow
from services.api.jobs import found, job_id_of
from services.api.listing import Excerpt, read_excerpt
from services.api.source import Source, ask, find

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
    if excerpt.follow:
        return await follow(request, job_id, excerpt)
    async with api.database.connection() as connection:
        source = await find(connection, found(await jobs.get(connection, job_id), job_id), excerpt)
    if source is None:
        return web.Response(body=b"", headers={**HEADERS, "Accept-Ranges": "bytes"})
    return await _pass_on(request, source, excerpt, asked)


def range_of(request: web.Request) -> str | None:
    """The one range of bytes that is asked for, if any. There are no validators that an If-Range could match."""
    ranges = request.headers.getall("Range", [])
    return ranges[0] if len(ranges) == 1 and RANGE.fullmatch(ranges[0]) and "If-Range" not in request.headers else None


async def _pass_on(request: web.Request, source: Source, excerpt: Excerpt, asked: str | None) -> web.StreamResponse:
    headers = {"Range": asked} if asked else {}
    async with ask(request, source, excerpt, headers, TIMEOUT) as answer:
        return await _stream(request, answer)


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
