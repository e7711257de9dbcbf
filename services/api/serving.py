"""Listening: the address, malformed requests, and an end that lets what is in flight finish."""

import asyncio
import resource

import structlog
from aiohttp import web
from aiohttp.http import RawRequestMessage

from core.errors import RowlockError
from core.settings import Settings
from services.api.app import HEADERS, running
from services.api.guard import check_address
from services.api.problems import Problem, from_http_exception

FINISH_SECONDS = 5
KEEP_ALIVE_SECONDS = 30
"""Also for a head to arrive in, from its first byte on: slow ones are cut off by the same clock."""


class ListenError(RowlockError):
    """The API cannot listen where it should."""


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Answer requests until told to stop; the listener does not wait for PostgreSQL."""
    await check_address(settings)
    _allow_connections()
    async with running(settings) as application:
        runner = Runner(
            application,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=FINISH_SECONDS,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
        )
        await runner.setup()
        try:
            await listen(runner, settings)
            await stop.wait()
        finally:
            await runner.cleanup()  # stops accepting, then waits for what is in flight


def _allow_connections() -> None:
    """Whoever waits for a job holds a connection: as many as the operator allows, not as the default does."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def listen(runner: web.AppRunner, settings: Settings) -> None:
    """Bind, or say in one line why that cannot be."""
    host, port = settings.api_host, settings.api_port
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ListenError(f"API_HOST={host} API_PORT={port}: cannot listen there: {error.strerror or error}") from None
    structlog.get_logger().info("api_listening", addresses=[f"{place[0]}:{place[1]}" for place in runner.addresses])


class Runner(web.AppRunner):
    """Answers what is no HTTP with a problem document too; aiohttp has no public place for that."""

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await plain.request_handler(request)
            except web.HTTPException as error:  # an expectation that cannot be met: looked at before any middleware
                return from_http_exception(error).response()

        # Compressed bodies are refused, so nothing is decompressed either, not even to be thrown away.
        kwargs = {**plain._kwargs, "auto_decompress": False}
        return _Server(handle, request_factory=plain.request_factory, loop=plain._loop, **kwargs)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """What came in. Where it cannot be read any more, no body will be completed, and nobody waits for one."""
        super().data_received(data)
        if not self._messages or isinstance(self._messages[-1][0], RawRequestMessage):
            return
        current = [] if self._current_request is None else [self._current_request.content]
        for body in (*current, *(body for _, body in self._messages)):
            if not body.is_eof():
                body.set_exception(web.RequestPayloadError("no HTTP"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that could not be read; the connection closes after it."""
        detail = "this is no HTTP request that can be read"
        if status >= 500:
            structlog.get_logger().error("request_crashed", exc_info=exc)
            detail = "an error of Rowlock's own; its log has the details"
        response = Problem(status, detail).response()
        response.headers.update(HEADERS)
        response.force_close()
        return response
