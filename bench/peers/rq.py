"""RQ: 8 worker processes of one job each, on a Redis of its own without persistence of each write.

`--variant simple` takes `SimpleWorker`, which runs a task in the worker itself; `--variant fork` the one that
`rq worker` takes by default, which forks for each job. All else is as it comes.

Accepted: `enqueue` has returned, so Redis has the job in its memory (of `list`: `enqueue_many`, one pipeline). First
line: of the script, by its own stamp. Final state: `latest_result` has it, which blocks on the stream that the worker
writes it to. A job of the burst was over when its task returned: that is the result that its client reads.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from redis import Redis
from rq import Queue
from rq.job import Job

from bench.peers.drive import SERVER, Client, Orders, Worker, command, main, run_script

CLASSES = {"simple": "rq.worker.SimpleWorker", "fork": "rq.worker.Worker"}
QUEUE = "bench"


class _Client(Client):
    def __init__(self, orders: Orders, queue: Queue) -> None:
        self._orders = orders
        self._queue = queue

    async def submit(self, number: int) -> Job:
        return self._queue.enqueue(run_script, self._orders.script, self._orders.output(number))

    async def submit_list(self, numbers: Sequence[int]) -> list[Job]:
        orders = self._orders
        prepared = [Queue.prepare_data(run_script, (orders.script, orders.output(number))) for number in numbers]
        return self._queue.enqueue_many(prepared)

    async def wait(self, job: Job, poll: float, seconds: float) -> float:
        result = job.latest_result(timeout=int(seconds))
        if result is None:
            raise TimeoutError(f"no result of job {job.id} in {seconds:g} s")
        if result.type != result.Type.SUCCESSFUL:
            raise RuntimeError(f"job {job.id} ended {result.type.name}: {result.exc_string}")
        return result.return_value


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    with Redis.from_url(SERVER) as redis:
        yield _Client(orders, Queue(QUEUE, connection=redis))


def workers(orders: Orders) -> list[Worker]:
    words = (command("rq"), "worker", "--url", SERVER, "--worker-class", CLASSES[orders.variant], QUEUE)
    return [Worker(words, ready="Listening on")] * orders.cpus


if __name__ == "__main__":
    sys.exit(main(client, workers))
