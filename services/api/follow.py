"""``GET /jobs/{job_id}/logs?follow=true``: an output as it is written, as server-sent events (WHATWG HTML, 9.2).

An event's id is the offset behind its bytes: who was cut off goes on from there by Last-Event-ID, and has each byte
once. What cannot be followed to its end is cut off as well: the end was not said.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import aiohttp
from aiohttp import web

from core.db import jobs, nodes
from core.errors import Unavailable
from core.records import Job
from core.states import FINAL, State
from services.api import guard, state
from services.api.jobs import found
from services.api.listing import Excerpt
from services.api.problems import Problem
from services.api.source import Source, ask, find

QUIET_SECONDS = 15.0
"""After which a comment shows that the connection lives."""
AGAIN_SECONDS = 1.0
PIECE = 32 * 1024
"""Bytes of an event at most: readers of lines have limits."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}

_OFFSET = re.compile(r"[0-9]{1,19}", re.ASCII)
_BEGUN = FINAL | {State.RUNNING}
_NOT_RUNNING = frozenset(State) - {State.RUNNING}


class _Gone(Exception):
    """Nobody reads any more."""


class _Events:
    """The answer, which begins with the first thing that is said."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS)

    @property
    def begun(self) -> bool:
        """Whether a problem comes too late."""
        return self.response.prepared

    async def say(self, text: str) -> None:
        """Send an event, or a comment. Raises _Gone."""
        if not guard.is_there(self._request):
            raise _Gone
        try:
            await self.begin()
            await self.response.write(text.encode())
        except (OSError, aiohttp.ClientError) as error:
            raise _Gone from error

    async def begin(self) -> None:
        """Send the head."""
        if not self.response.prepared:
            await self.response.prepare(self._request)

    async def piece(self, data: bytes, offset: int) -> None:
        """Bytes of the output, and the offset behind them."""
        await self.say(f"id: {offset}\ndata: {base64.b64encode(data).decode()}\n\n")

    async def quiet(self) -> None:
        """A comment."""
        await self.say(":\n\n")

    async def end(self, job: Job, attempt: int) -> None:
        """The output of an attempt is complete."""
        document = {"job_id": job.job_id, "attempt": attempt, "state": job.state}
        await self.say(f"event: end\ndata: {json.dumps(document)}\n\n")
        await self.response.write_eof()


async def follow(request: web.Request, job_id: int, excerpt: Excerpt) -> web.StreamResponse:
    """The output of a job's last attempt, or of one attempt alone, from its start to its end.

    Of what waits, the next attempt's. Ends when the attempt is over, with the job's state: of one that goes back to the
    queue that is none of the final ones, and its next attempt is followed by ``attempt=``.
    """
    events = _Events(request)
    with _known(state.of(request)):
        try:
            await _follow(request, events, job_id, _resumed(request, excerpt))
        except _Gone:
            pass
        except (Problem, Unavailable, aiohttp.ClientError, OSError):
            if not events.begun:
                raise
            if request.transport is not None:
                request.transport.abort()
    return events.response


@contextmanager
def _known(api: state.State) -> Iterator[None]:
    """Those who follow are cut off when this process stops."""
    task = asyncio.current_task()
    assert task is not None
    api.followers.add(task)
    try:
        yield
    finally:
        api.followers.discard(task)


def _resumed(request: web.Request, excerpt: Excerpt) -> Excerpt:
    last = request.headers.get("Last-Event-ID")
    if last is None:
        return excerpt
    if not _OFFSET.fullmatch(last) or int(last) >= 2**63:
        raise Problem(400, "Last-Event-ID should be the id of an event of this stream: an offset in bytes")
    return replace(excerpt, offset=int(last), tail=None)


async def _follow(request: web.Request, events: _Events, job_id: int, excerpt: Excerpt) -> None:
    api = state.of(request)
    async with api.database.connection() as connection:
        job = found(await jobs.get(connection, job_id), job_id)
    if request.method == "HEAD":
        await events.begin()
        return
    if _waits(job, excerpt.attempt):
        job = await _once(api, events, job, _BEGUN)
    attempt = excerpt.attempt or job.attempt
    if attempt <= job.attempt or not events.begun:  # a problem, where it has had no such attempt
        async with api.database.connection() as connection:
            source = await find(connection, job, excerpt)
        if source is not None:
            await _pass_on(request, events, source, excerpt)
    if attempt == job.attempt and job.state is State.RUNNING:
        job = await _once(api, events, job, _NOT_RUNNING)
    await events.end(job, attempt)


def _waits(job: Job, attempt: int | None) -> bool:
    """Whether what is to be followed has not begun."""
    if job.state is State.PENDING:
        return attempt in (None, job.attempt + 1)
    return job.state is State.CONFIGURING and attempt in (None, job.attempt)


async def _once(api: state.State, events: _Events, job: Job, until: frozenset[State]) -> Job:
    """The job once it is in one of these states, or has had another attempt since."""
    loop, attempt = asyncio.get_running_loop(), job.attempt
    while job.state not in until:
        await events.quiet()
        asked = loop.time()
        try:
            job = found(await api.watch.job(job.job_id, until, QUIET_SECONDS), job.job_id)
        except Unavailable:
            await asyncio.sleep(AGAIN_SECONDS)
        if until is _NOT_RUNNING and job.attempt != attempt:
            break
        if loop.time() - asked < QUIET_SECONDS / 2:  # too many wait, and none is waited for
            await asyncio.sleep(0 if job.state in until else AGAIN_SECONDS)
    return job


async def _pass_on(request: web.Request, events: _Events, source: Source, excerpt: Excerpt) -> None:
    async with ask(request, source, excerpt, {}, TIMEOUT) as answer:
        offset = int(answer.headers["Rowlock-Offset"])
        if not events.begun:
            await events.quiet()
        async for data in _pieces(request, events, source, answer.content):
            offset += len(data)
            await events.piece(data, offset)


async def _pieces(
    request: web.Request, events: _Events, source: Source, content: aiohttp.StreamReader
) -> AsyncIterator[bytes]:
    """What the worker sends, to its end. Raises ClientError where it was cut off, or its node is not heard any more."""
    while True:
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                data = await content.readany()
        except TimeoutError:
            await events.quiet()
            await _check_node(request, source)
            continue
        if not data:
            return
        for at in range(0, len(data), PIECE):
            yield data[at : at + PIECE]


async def _check_node(request: web.Request, source: Source) -> None:
    """A machine that is gone says nothing, and its connections look alive."""
    assert source.job.node is not None
    async with state.of(request).database.connection() as connection:
        if await nodes.file_server(connection, source.job.node) is None:
            raise aiohttp.ClientError("its node's lease is over")
