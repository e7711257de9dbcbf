"""Celery: one worker with a pool of 8, broker and results on a Redis of its own without persistence of each write.

`--variant prefork` has 8 processes, the default; `--variant threads` 8 threads of one process. As the guide
("Optimizing") says for short tasks: `worker_prefetch_multiplier` is 64 instead of 4. Without gossip, mingle and
heartbeat, which serve several workers. Acknowledgement, serializer and results are as they come.

Accepted: `delay` has returned, so Redis has the job in its memory. First line: of the script, by its own stamp. Final
state: `AsyncResult.get` has returned; the worker publishes the result and the client is told. A job of the burst was
over when its task returned: that is the result that its client reads.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from celery import Celery
from celery.result import AsyncResult

from bench.peers.drive import SERVER, Client, Orders, Worker, command, main, run_script

URL = SERVER.replace("unix://", "redis+socket://")

app = Celery("bench", broker=URL, backend=URL)
app.conf.update(worker_prefetch_multiplier=64, broker_connection_retry_on_startup=True)
run = app.task(name="run")(run_script)


class _Client(Client):
    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    async def submit(self, number: int) -> AsyncResult:
        return run.delay(self._orders.script, self._orders.output(number))

    async def wait(self, job: AsyncResult, poll: float, seconds: float) -> float:
        job.ready()  # takes in what is there; without it `get` waits for a message that has come already, for a second
        return job.get(timeout=seconds)


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    yield _Client(orders)


def workers(orders: Orders) -> list[Worker]:
    pool = ("--pool", orders.variant, "--concurrency", str(orders.cpus), "--loglevel", "INFO")
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    words = (command("celery"), "--app", "bench.peers.celery", "worker", *pool, *alone)
    return [Worker(words, ready=" ready.")]


if __name__ == "__main__":
    sys.exit(main(client, workers))
