"""The node's files over HTTP, for the API alone: found by job, attempt and stream, never by a path from a request."""

import hmac
import os
import socket

from aiohttp import web

from core.db import jobs
from core.db.connection import Pool
from core.records import Job
from core.settings import Settings
from services.worker import files
from services.worker.environment import Host
from services.worker.launch import paths_of

CHUNK = 256 * 1024
CONTENT_TYPE = "text/plain; charset=utf-8"


class FileServer:
    """Serves ``GET /logs/{job_id}/{attempt}/{stream}`` to whoever shows the incarnation's secret."""

    def __init__(self, settings: Settings, host: Host, pool: Pool, secret: str) -> None:
        self._settings = settings
        self._host = host
        self._pool = pool
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
        async with self._pool.acquire() as connection:
            job = await jobs.get(connection, int(request.match_info["job_id"]))
        if job is None or job.node != self._settings.node_name or job.attempt != int(request.match_info["attempt"]):
            return web.Response(status=404)
        try:
            descriptor = self._open(job, request.match_info["stream"])
        except FileNotFoundError:
            return await _send(request, None)
        except (files.FileRefused, OSError):
            return web.Response(status=404)
        try:
            return await _send(request, descriptor)
        finally:
            os.close(descriptor)

    def _open(self, job: Job, stream: str) -> int:
        paths = paths_of(self._settings, self._host, job)
        path = paths.standard_output if stream == "stdout" else paths.standard_error
        return files.open_for_reading(self._settings.roots, path)


async def _send(request: web.Request, descriptor: int | None) -> web.StreamResponse:
    """Send what the request asks for of an open file; no file is an empty one: nothing was written yet."""
    size = 0 if descriptor is None else os.fstat(descriptor).st_size
    wanted = _wanted(request, size)
    headers = {"Content-Type": CONTENT_TYPE, "Accept-Ranges": "bytes"}
    if wanted is None:
        return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    status, start, stop = wanted
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = stop - start
    await response.prepare(request)
    while descriptor is not None and start < stop and request.method != "HEAD":
        chunk = os.pread(descriptor, min(CHUNK, stop - start), start)
        if not chunk:
            # Somebody truncated the file: cut the connection short of its length, and the client knows.
            response.force_close()
            if request.transport is not None:
                request.transport.abort()
            break
        await response.write(chunk)
        start += len(chunk)
    return response


def _wanted(request: web.Request, size: int) -> tuple[int, int, int] | None:
    """(status, start, stop) in bytes of the file; None when the range cannot be satisfied (RFC 9110, 14.2)."""
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
