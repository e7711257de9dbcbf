"""Long polls: who waits for a state of a job costs nothing until something changes, and then its share of one look.

Roles tell over Redis what jobs have come to, while anybody listens; what they say is looked up for all that wait at
once. A poll of the jobs that are waited for lies underneath, so that without Redis all is answered, later.
"""

import asyncio
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import structlog
from redis.asyncio import Redis

from core.cancellation import pause
from core.db import jobs
from core.duty import NEVER
from core.errors import Unavailable
from core.moves import Ear
from core.records import Job
from core.states import State
from core.streams import BLOCK_MS
from core.wakeup import Wakeup
from services.api.database import Database

MOST_WAITERS = 10_000
APART_SECONDS = 0.005
"""One look begins so long after the last one, at least."""
LOOK_SECONDS = 5.0
SETTLING_SECONDS = BLOCK_MS / 1000 + 0.5
"""For so long after this process began to listen, workers may not know of it."""
SETTLING_POLL_SECONDS = 0.05
POLL_SHARE = 4
"""A poll comes so many times later than the last one took, at least."""
LISTEN_SECONDS = 60.0
"""For which it goes on listening when nobody waits: who waits now and then finds that workers know."""
REOPEN_SECONDS = 1.0


def _future() -> "asyncio.Future[Job | None]":
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class _Waiter:
    job_id: int
    until: frozenset[State]
    is_there: Callable[[], bool]
    as_it_is: asyncio.Future[Job | None] = field(default_factory=_future)
    """The job as a look finds it that began after this was asked for."""
    as_awaited: asyncio.Future[Job | None] = field(default_factory=_future)
    """The job once it is what is waited for; None when there is nothing left to wait for."""


class Watch:
    """The long polls of one API process."""

    def __init__(self, database: Database, redis: Redis, poll_seconds: float) -> None:
        self.listen = Wakeup()
        """Set when there is something to listen for."""
        self._database = database
        self._ear = Ear(redis)
        self._poll_seconds = poll_seconds
        self._wake = Wakeup()
        self._waiters: dict[int, set[_Waiter]] = {}
        self._count = 0
        self._most = min(MOST_WAITERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # each has its socket
        self._asking: list[_Waiter] = []
        """Those that the next look answers, whatever it finds."""
        self._moved: set[int] = set()
        """Jobs that are said to be what somebody waits for."""
        self._next_look = 0.0
        self._next_poll = 0.0
        self._settles = 0.0
        self._waited_at = 0.0
        self._closed = False

    async def job(
        self, job_id: int, until: frozenset[State], seconds: float, is_there: Callable[[], bool] = lambda: True
    ) -> Job | None:
        """The job once it is in one of these states, or as it is after so many seconds; None when there is none.

        `is_there` says whether somebody still waits for the answer. Raises Unavailable while PostgreSQL is away at
        the beginning or at the end. Where too many wait already, the job as it is now.
        """
        ends = asyncio.get_running_loop().time() + seconds
        with self._waiting(job_id, until, is_there) as waiter:
            job = await self._as_it_is(waiter)
            if job is None or job.state in until or self._closed or self._count > self._most:
                return job
            with suppress(TimeoutError):
                async with asyncio.timeout_at(ends):
                    found = await waiter.as_awaited
                if found is not None:
                    return found
            if not is_there():
                return job
            waiter.as_it_is = _future()
            return await self._as_it_is(waiter)

    async def _as_it_is(self, waiter: _Waiter) -> Job | None:
        self._asking.append(waiter)
        self._wake.set()
        return await waiter.as_it_is

    @contextmanager
    def _waiting(self, job_id: int, until: frozenset[State], is_there: Callable[[], bool]) -> Iterator[_Waiter]:
        waiter = _Waiter(job_id, until, is_there)
        self._waiters.setdefault(job_id, set()).add(waiter)
        if self._count == 0:  # a poll that nobody needed is not overdue
            now = asyncio.get_running_loop().time()
            self._next_poll = max(self._next_poll, now + self._apart(now))
            self.listen.set()
        self._count += 1
        try:
            yield waiter
        finally:
            self._count -= 1
            self._waited_at = asyncio.get_running_loop().time()
            left = self._waiters[job_id]
            left.discard(waiter)
            if not left:
                del self._waiters[job_id]

    def _apart(self, now: float) -> float:
        """Seconds from one poll to the next."""
        return min(self._poll_seconds, SETTLING_POLL_SECONDS) if now < self._settles else self._poll_seconds

    async def run(self) -> None:
        """Look whenever somebody asks or something is said, and for all that wait now and then."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait(max(0.0, self._next_poll - loop.time()) if self._waiters else NEVER)
            await asyncio.sleep(self._next_look - loop.time())
            self._next_look = loop.time() + APART_SECONDS
            await self._look()

    async def _look(self) -> None:
        """Answer those who ask, and those whose jobs have come to a state that they wait for."""
        asking, self._asking = self._asking, []
        moved, self._moved = self._moved & self._waiters.keys(), set()
        wanted = moved | {waiter.job_id for waiter in asking}
        try:
            if asyncio.get_running_loop().time() >= self._next_poll:
                wanted |= await self._poll()
            found = await self._read(wanted) if wanted else {}
        except Unavailable as error:  # whoever waits already goes on waiting
            self._moved |= moved
            _fail((waiter.as_it_is for waiter in asking), error)
            return
        except Exception as error:  # noqa: BLE001 - raised again in everybody whom it may concern
            structlog.get_logger().exception("look_failed", jobs=len(wanted))  # a poll may concern nobody yet
            _fail((waiter.as_it_is for waiter in asking), error)
            waiting = [waiter for job_id in wanted for waiter in self._waiters.get(job_id, ())]
            _fail((waiter.as_awaited for waiter in waiting if waiter.as_it_is.done()), error)
            return
        for waiter in asking:
            _answer(waiter.as_it_is, found.get(waiter.job_id))
        for job_id, job in found.items():
            for waiter in self._waiters.get(job_id, ()):
                # Not who has come meanwhile: what was read may be older.
                if waiter.as_it_is.done() and job.state in waiter.until:
                    _answer(waiter.as_awaited, job)

    async def _read(self, job_ids: set[int]) -> dict[int, Job]:
        async with self._database.watch() as connection, asyncio.timeout(LOOK_SECONDS):
            return {job.job_id: job for job in await jobs.get_all(connection, sorted(job_ids))}

    async def _poll(self) -> set[int]:
        """The jobs that are what somebody waits for. Those who are gone are let go: no server hears of that itself."""
        loop = asyncio.get_running_loop()
        self._next_poll = loop.time() + self._poll_seconds
        for waiter in self._everybody():
            if not waiter.is_there():
                _answer(waiter.as_awaited, None)
        async with self._database.watch() as connection, asyncio.timeout(LOOK_SECONDS):
            began = loop.time()
            states = await jobs.states(connection, sorted(self._waiters))
        now = loop.time()
        self._next_poll = now + max(self._apart(now), POLL_SHARE * (now - began))
        return {job_id for job_id, state in states.items() if self._is_awaited(job_id, state)}

    def _is_awaited(self, job_id: int, state: State) -> bool:
        return any(state in waiter.until for waiter in self._waiters.get(job_id, ()))

    def _everybody(self) -> list[_Waiter]:
        return [waiter for waiters in self._waiters.values() for waiter in waiters]

    async def listen_once(self) -> int:
        """Hear what moves, while somebody waits and for a while longer."""
        now = asyncio.get_running_loop().time()
        if not self._waiters and now > self._waited_at + LISTEN_SECONDS:
            await self._ear.close()
            return 0
        self.listen.set()  # come again
        said = await self._ear.hear()
        if said is None:
            if now < self._settles:  # the last one did not last
                await pause(REOPEN_SECONDS)
            self._settles = asyncio.get_running_loop().time() + SETTLING_SECONDS
            self._next_poll = 0.0
            self._wake.set()
        elif moved := {job_id for job_id, state in said if self._is_awaited(job_id, state)}:
            self._moved |= moved
            self._wake.set()
        return 0

    def close(self) -> None:
        """Let nobody wait any longer: each gets its job as it is."""
        self._closed = True
        for waiter in self._everybody():
            _answer(waiter.as_awaited, None)


def _answer(future: "asyncio.Future[Job | None]", job: Job | None) -> None:
    if not future.done():
        future.set_result(job)


def _fail(futures: "Iterable[asyncio.Future[Job | None]]", error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
            future.exception()  # perhaps nobody waits for it any more
