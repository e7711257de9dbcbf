"""procrastinate: one worker process, 8 coroutines at once, on a PostgreSQL of its own, as durable as Rowlock's.

Accepted: `defer_async` has returned, so the job is committed (of `list`: `batch_defer_async`, one statement). First
line: of the script, by its own stamp. Final state: `get_job_status_async` says so, asked each millisecond, as nothing
tells it. A job of the burst was over by procrastinate's own event of it, PostgreSQL's clock.

All is as it comes, `listen_notify` too; the client's pool has a connection for each job that is posted at once.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from procrastinate import App, PsycopgConnector
from procrastinate.jobs import Status

from bench.peers.drive import CONNECTIONS, SERVER, Client, Orders, Worker, command, main, run_script_async

COMMAND = (command("procrastinate"), "--app", "bench.peers.procrastinate.app")
ENDED = """
SELECT extract(epoch FROM at)::float AS at FROM procrastinate_events WHERE job_id = %(id)s AND type = 'succeeded'
"""
OVER = (Status.FAILED, Status.CANCELLED, Status.ABORTED)

app = App(connector=PsycopgConnector(conninfo=SERVER, min_size=CONNECTIONS, max_size=CONNECTIONS))


@app.task(name="run")
async def run(script: str, output: str) -> None:
    await run_script_async(script, output)


class _Client(Client):
    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    async def submit(self, number: int) -> int:
        return await run.defer_async(**self._arguments(number))

    async def submit_list(self, numbers: Sequence[int]) -> list[int]:
        return await run.batch_defer_async(*map(self._arguments, numbers))

    async def wait(self, job: int, poll: float, seconds: float) -> float:
        deadline = time.monotonic() + seconds
        while (status := await app.job_manager.get_job_status_async(job)) != Status.SUCCEEDED:
            if status in OVER or time.monotonic() > deadline:
                raise RuntimeError(f"job {job} is {status.value}")
            await asyncio.sleep(poll)
        return (await app.connector.execute_query_one_async(ENDED, id=job))["at"]

    def _arguments(self, number: int) -> dict[str, str]:
        return {"script": self._orders.script, "output": self._orders.output(number)}


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    async with app.open_async():
        yield _Client(orders)


def workers(orders: Orders) -> list[Worker]:
    subprocess.run((*COMMAND, "schema", "--apply"), check=True, capture_output=True)
    return [Worker((*COMMAND, "worker", "--concurrency", str(orders.cpus)), ready="Starting worker")]


if __name__ == "__main__":
    sys.exit(main(client, workers))
