"""The node's files over HTTP, for the API alone: found by job, attempt and stream, never by a path from a request."""

import asyncio
import hmac
import os
import resource
import socket
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import cast

import structlog
from aiohttp import web

from core.attempts import OFFSET_HEADER, Stream, as_of, own_bytes
from core.db import jobs, outputs
from core.db.connection import CONNECTION_ERRORS, Pool, describe
from core.records import Attempt, Job
from core.settings import Settings
from core.states import State
from services.worker import files
from services.worker.environment import Host
from services.worker.follow import Runs, begun, pieces
from services.worker.launch import paths_of

CHUNK = 256 * 1024
CONTENT_TYPE = "text/plain; charset=utf-8"
FOLLOWERS_SHARE = 8
"""Of the descriptors that this process may have: each takes two."""
BEGUN_SECONDS = 10.0


class FileServer:
    """Serves ``GET /logs/{job_id}/{attempt}/{stream}`` to whoever shows the incarnation's secret.

    The attempt is the job's last one, and the answer the whole file; with ``?alone`` it is any, and its own bytes.
    With ``?follow``, of any attempt, its own bytes go on until it is over; cut off, it was not.
    """

    def __init__(self, settings: Settings, host: Host, pool: Pool, secret: str, runs: Runs) -> None:
        """`runs` are the node's, now and later."""
        self._settings = settings
        self._host = host
        self._pool = pool
        self._runs = runs
        self._followers = 0
        self._secret = secret.encode()
        application = web.Application()
        application.router.add_get(r"/logs/{job_id:\d{1,19}}/{attempt:\d{1,10}}/{stream:stdout|stderr}", self._logs)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1)

    async def start(self) -> str:
        """Listen; answer the address that the API is to use."""
        settings = self._settings
        await self._runner.setup()
        await web.TCPSite(self._runner, settings.worker_host, settings.worker_port).start()
        port = self._runner.addresses[0][1]
        if settings.worker_address:
            return settings.worker_address.format(port=port)
        host = socket.gethostname() if settings.worker_host in ("0.0.0.0", "::", "") else settings.worker_host  # noqa: S104
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        await self._runner.cleanup()

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        shown = secret.encode(errors="surrogateescape")  # a header is bytes of any kind
        if scheme != "Bearer" or not hmac.compare_digest(shown, self._secret):
            return web.Response(status=401)
        try:
            return await self._answer(request)
        except CONNECTION_ERRORS as error:
            structlog.get_logger().warning("output_not_served", error=describe(error))
            return web.Response(status=503)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        job_id, attempt = int(request.match_info["job_id"]), int(request.match_info["attempt"])
        stream, alone = cast(Stream, request.match_info["stream"]), "alone" in request.query
        async with self._pool.acquire() as connection:
            job = await jobs.get(connection, job_id)
            if job is not None and alone:
                job = as_of(job, await outputs.starts(connection, job_id), attempt)
        if job is None or job.node != self._settings.node_name or job.attempt != attempt:
            return web.Response(status=409)  # it has moved on since the API looked
        if "follow" in request.query:
            return await self._follow(request, job, stream)
        try:
            descriptor = files.open_for_reading(self._settings.roots, self._path(job, stream))
        except FileNotFoundError:
            return await _send(request, None, range(0))
        except (files.FileRefused, OSError):
            return web.Response(status=404)
        try:
            part = range(os.fstat(descriptor).st_size)
            if alone:
                part = await self._own_bytes(job, stream, len(part))
            return await _send(request, descriptor, part)
        finally:
            os.close(descriptor)

    async def _follow(self, request: web.Request, job: Job, stream: Stream) -> web.StreamResponse:
        if self._followers >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FOLLOWERS_SHARE:
            return web.Response(status=503)  # jobs need descriptors, too
        self._followers += 1
        try:
            return await self._followed(request, job, stream)
        finally:
            self._followers -= 1

    async def _followed(self, request: web.Request, job: Job, stream: Stream) -> web.StreamResponse:
        attempt, path = Attempt(job.job_id, job.attempt), self._path(job, stream)

        async def until_begun() -> None:
            await begun(attempt, self._runs, lambda: self._is_running(job))

        async def own(size: int) -> range:
            return await self._own_bytes(job, stream, size)

        try:
            if "tail" in request.query:
                async with asyncio.timeout(BEGUN_SECONDS):
                    await until_begun()
            part = await own(self._size(path))
        except files.FileRefused:
            return web.Response(status=404)
        offset = _offset(request, len(part))
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE, OFFSET_HEADER: str(offset)})
        found = pieces(
            lambda: files.open_for_reading(self._settings.roots, path),
            part.start + offset,
            lambda: (run := self._runs.get(attempt)) is None or run.over,
            own,
        )
        try:
            await response.prepare(request)
            await until_begun()
            async with aclosing(found):
                async for piece in found:
                    if request.transport is None or request.transport.is_closing():
                        return response
                    if piece:
                        await response.write(piece)
            await response.write_eof()
        except (*CONNECTION_ERRORS, files.FileRefused):
            # Not to its end: the connection is cut, and the reader knows.
            if request.transport is not None:
                request.transport.abort()
        return response

    def _size(self, path: str) -> int:
        try:
            descriptor = files.open_for_reading(self._settings.roots, path)
        except FileNotFoundError:
            return 0
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    async def _is_running(self, job: Job) -> bool:
        async with self._pool.acquire() as connection:
            found = await jobs.get(connection, job.job_id)
        return found is not None and found.state is State.RUNNING and found.attempt == job.attempt

    async def _own_bytes(self, job: Job, stream: Stream, size: int) -> range:
        """Of a file that had so many bytes a moment ago: whoever has written to it since then had said so before."""
        async with self._pool.acquire() as connection:
            starts = await outputs.starts(connection, job.job_id)
        return own_bytes(
            starts, job.attempt, stream, lambda restarts: self._path(replace(job, restart_cnt=restarts), stream), size
        )

    def _path(self, job: Job, stream: Stream) -> str:
        paths = paths_of(self._settings, self._host, job)
        return paths.standard_output if stream == "stdout" else paths.standard_error


def _offset(request: web.Request, size: int) -> int:
    """Where to begin in what has so many bytes now."""
    if "tail" in request.query:
        return max(0, size - int(request.query["tail"]))
    return int(request.query.get("offset", 0))


async def _send(request: web.Request, descriptor: int | None, part: range) -> web.StreamResponse:
    """Send what the request asks for of a part of an open file; no file is an empty one: nothing was written yet."""
    size = len(part)
    wanted = _wanted(request, size)
    headers = {"Content-Type": CONTENT_TYPE, "Accept-Ranges": "bytes"}
    if wanted is None:
        return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    status, start, stop = wanted
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = stop - start
    if request.method == "HEAD":
        start = stop
    with suppress(OSError):  # whoever reads is gone, or the disk cannot be read
        await response.prepare(request)
        while descriptor is not None and start < stop:
            chunk = os.pread(descriptor, min(CHUNK, stop - start), part.start + start)
            if not chunk:
                break  # somebody truncated the file
            await response.write(chunk)
            start += len(chunk)
    if start < stop:  # cut the connection short of its length, and the client knows
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
    return response


def _wanted(request: web.Request, size: int) -> tuple[int, int, int] | None:
    """(status, start, stop) in bytes of what has so many; None when the range cannot be satisfied (RFC 9110, 14.2)."""
    if "offset" in request.query:
        return 200, min(int(request.query["offset"]), size), size
    if "tail" in request.query:
        return 200, max(0, size - int(request.query["tail"])), size
    try:
        wanted = request.http_range
    except ValueError:
        return 200, 0, size  # a Range that is not understood is ignored
    if wanted.start is None and wanted.stop is None:
        return 200, 0, size
    start = wanted.start or 0
    if request.headers["Range"].replace(" ", "").endswith("=-0"):
        return None  # the last 0 bytes, which Python's slices take for everything
    if start < 0:
        return (206, max(0, size + start), size) if size else None
    stop = size if wanted.stop is None else min(wanted.stop, size)
    return (206, start, stop) if start < stop else None
