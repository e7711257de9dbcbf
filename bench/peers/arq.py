"""arq: one worker process, 8 coroutines at once, on a Redis of its own without persistence of each write.

Accepted: `enqueue_job` has returned, so Redis has the job in its memory. First line: of the script, by its own stamp.
Final state: `Job.result` has found it; arq has no way but to ask again and again, here each millisecond. A job of the
burst was over when its task returned: that is the result that its client reads.

Of its settings two are not the defaults: `max_jobs` for the 8 CPUs, and `poll_delay`. The worker sleeps that long
between two looks at its queue, also while jobs wait; with the half second that it comes with an idle worker would
begin a job 250 ms late on average, and a full one start 8 jobs each half second.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import arq
from arq.connections import ArqRedis, RedisSettings, create_pool
from arq.jobs import Job

from bench.peers.drive import SERVER, Client, Orders, Worker, command, main, run_script_async

REDIS = RedisSettings.from_dsn(SERVER)


async def run_task(_: dict[str, Any], script: str, output: str) -> float:
    return await run_script_async(script, output)


class Settings:
    """What `arq bench.peers.arq.Settings` reads."""

    functions = (arq.func(run_task, name="run"),)
    redis_settings = REDIS
    max_jobs = 8
    poll_delay = 0.001


class _Client(Client):
    def __init__(self, orders: Orders, redis: ArqRedis) -> None:
        self._orders = orders
        self._redis = redis

    async def submit(self, number: int) -> Job:
        job = await self._redis.enqueue_job("run", self._orders.script, self._orders.output(number))
        assert job is not None  # it would be known already
        return job

    async def wait(self, job: Job, poll: float, seconds: float) -> float:
        return await job.result(seconds, poll_delay=poll)


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    redis = await create_pool(REDIS)
    try:
        yield _Client(orders, redis)
    finally:
        await redis.aclose()


def workers(_: Orders) -> list[Worker]:
    return [Worker((command("arq"), "bench.peers.arq.Settings"), ready="Starting worker for")]


if __name__ == "__main__":
    sys.exit(main(client, workers))
