"""Dramatiq: 2 processes of 4 threads, broker and results on a Redis of its own without persistence of each write.

`dramatiq_worker_timeout` is 10 ms instead of 1 s: an idle worker asks Redis again after up to that long, and its
threads look that often. All else is as it comes.

Accepted: `send` has returned, so Redis has the job in its memory. First line: of the script, by its own stamp. Final
state: `get_result` has returned, which blocks in Redis. A job of the burst was over when its task returned: that is the
result that its client reads.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from bench.peers.drive import SERVER, Client, Orders, Worker, command, main, run_script

PROCESSES = 2

broker = RedisBroker(url=SERVER)
broker.add_middleware(Results(backend=RedisBackend(url=SERVER)))
dramatiq.set_broker(broker)
run = dramatiq.actor(run_script, actor_name="run", store_results=True, max_retries=0)


class _Client(Client):
    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    async def submit(self, number: int) -> dramatiq.Message:
        return run.send(self._orders.script, self._orders.output(number))

    async def wait(self, job: dramatiq.Message, poll: float, seconds: float) -> float:
        return job.get_result(block=True, timeout=int(seconds * 1000))


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    yield _Client(orders)


def workers(orders: Orders) -> list[Worker]:
    threads = ("--processes", str(PROCESSES), "--threads", str(orders.cpus // PROCESSES))
    words = ("/usr/bin/env", "dramatiq_worker_timeout=10", command("dramatiq"), "bench.peers.dramatiq", *threads)
    return [Worker(words, ready="ready for action", times=PROCESSES)]


if __name__ == "__main__":
    sys.exit(main(client, workers))
