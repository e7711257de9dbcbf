"""The application: routes, what every request passes through, and the duties beside them."""

import asyncio
import getpass
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

import aiohttp
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from core import streams
from core.db.connection import notify
from core.duty import NEVER, repeat
from core.errors import Unavailable
from core.moves import Moves
from core.settings import Settings, without_secrets
from core.wakeup import Wakeup
from services.api import cancel, docs, health, jobs, lists, logs, nodes, request_id
from services.api.call import Calls
from services.api.conditional import answer_unchanged
from services.api.database import Database
from services.api.guard import guard
from services.api.models import Site
from services.api.problems import answer_problems
from services.api.state import STATE, State
from services.api.submit import Submitter
from services.api.watch import Watch

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]

NODE = "/api/v1/nodes/{name:[^/]+}"  # braces may stand in a node's name

ROUTES: tuple[tuple[str, str, Handle], ...] = (
    ("GET", "/", health.root),
    ("GET", "/health", health.health),
    ("GET", "/openapi.json", docs.description),
    ("GET", "/docs", docs.docs),
    ("POST", "/api/v1/jobs", jobs.post_jobs),
    ("GET", "/api/v1/jobs", jobs.list_jobs),
    ("GET", "/api/v1/jobs/{job_id}", jobs.get_job),
    ("DELETE", "/api/v1/jobs/{job_id}", cancel.cancel_job),
    ("GET", "/api/v1/jobs/{job_id}/script", jobs.get_script),
    ("GET", "/api/v1/jobs/{job_id}/logs", logs.get_logs),
    ("POST", "/api/v1/jobs/{job_id}/cancel", cancel.cancel_job),
    ("GET", "/api/v1/nodes", nodes.list_nodes),
    ("GET", NODE, nodes.get_node),
    ("PATCH", NODE, nodes.patch_node),
    ("DELETE", NODE, nodes.delete_node),
)

_log = structlog.get_logger()
HEADERS = {"Server": "rowlock", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""Of every answer."""


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[web.Application]:
    """The application with its duties at work; they end with the block, and what they opened is closed."""
    database, redis, wake = Database(settings), streams.connect(settings), Wakeup()
    link = streams.Link(redis)
    calls = Calls(link, wake)
    # No limit: a pool of connections that slow readers of logs hold would shut out everybody else.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False) as workers:
        state = State(
            site=site_of(settings),
            database=database,
            submitter=Submitter(database, wake, calls.add),
            redis=redis,
            link=link,
            calls=calls,
            workers=workers,
            watch=Watch(database, redis, settings.poll_seconds),
            moves=Moves(wanted=lambda: True),
            wake=wake,
            followers=set(),
            large=asyncio.Semaphore(lists.LARGE_LISTS),
        )
        try:
            async with asyncio.TaskGroup() as group:
                duties = [group.create_task(duty) for duty in _duties(settings, state)]
                try:
                    yield application(settings, state)
                finally:
                    for duty in duties:
                        duty.cancel()
        finally:
            await database.close()
            await state.redis.aclose()


def _duties(settings: Settings, state: State) -> list[Coroutine[Any, Any, None]]:
    async def notify_once() -> int:
        # A hint that is lost costs a poll of the scheduler's; PostgreSQL being away must not end this role.
        with suppress(Unavailable):
            async with state.database.bell() as connection:
                await notify(connection)
        return 0

    return [
        state.database.keep_open(),
        state.submitter.run(),
        # One NOTIFY in flight at most: what is set meanwhile is one more, afterwards.
        repeat("notify", notify_once, state.wake, NEVER),
        repeat("call", state.calls.call_once, state.calls.filled, NEVER),
        state.watch.run(),
        repeat("listen", state.watch.listen_once, state.watch.listen, NEVER),
        repeat("tell", lambda: state.moves.tell_once(state.link), state.moves.wake, NEVER),
        streams.name_when_away(state.redis, without_secrets(settings.redis_dsn)),
    ]


def site_of(settings: Settings) -> Site:
    """What submissions are held against."""
    roots = tuple(PurePosixPath(os.path.normpath(root)) for root in settings.roots)
    return Site(roots=roots, default_partition=settings.partitions[0], user=_user())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's account without a name
        return str(os.getuid())


def application(settings: Settings, state: State) -> web.Application:
    """The routes, behind the guard and the problem answers."""
    app = web.Application(
        middlewares=[note_access, answer_problems, guard(settings), answer_unchanged], client_max_size=0
    )
    app[STATE] = state
    for method, path, handler in ROUTES:
        # A route for GET answers HEAD as well.
        for verb in ("GET", "HEAD") if method == "GET" else (method,):
            app.router.add_route(verb, path, handler, expect_handler=_expect)
    app.on_response_prepare.append(_add_headers)

    async def end_waiting(_: web.Application) -> None:
        state.watch.close()
        for task in state.followers:
            task.cancel()

    app.on_shutdown.append(end_waiting)
    return app


@web.middleware
async def note_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One event per request."""
    began = time.perf_counter()
    with request_id.known(request):
        response = await handler(request)
        _log.debug(
            "request",
            method=request.method,
            path=request.rel_url.raw_path,
            status=response.status,
            seconds=round(time.perf_counter() - began, 6),
        )
    return response


async def _expect(request: web.Request) -> None:
    # "100 Continue" itself is sent by who reads the body, once nothing else is wrong with the request.
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    if (own := request_id.of(request)) is not None:
        response.headers[request_id.HEADER] = own
