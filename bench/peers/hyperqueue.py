"""HyperQueue: the local cluster of its Python package, a worker with 8 CPUs. Server, worker and client are threads of
one process; there is no HTTP, and nothing is durable (no journal).

Accepted: `submit` has returned a job's number; of `list`, one job of all the tasks. First line: of the script, by its
own stamp. Final state: `wait_for_jobs` says so. It asks the server once a second; the driver asks at its own pace, by a
callback that ends the call after one answer. HyperQueue's Python API tells no times: a job of the burst was
over when the client saw that.

A task runs the script itself with its stdout in a file; stderr goes nowhere, where the others have it in the file.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from hyperqueue import Client as HyperQueue
from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig

from bench.peers.drive import Client, Orders, main


class _Client(Client):
    def __init__(self, orders: Orders, server: HyperQueue) -> None:
        self._orders = orders
        self._server = server
        self._open: set[int] = set()
        self._over: dict[int, float] = {}

    async def submit(self, number: int) -> int:
        return self._submit([number])

    async def submit_list(self, numbers: Sequence[int]) -> list[int]:
        return [self._submit(numbers)]

    def _submit(self, numbers: Sequence[int]) -> int:
        job = Job()
        for number in numbers:
            job.program([self._orders.script], stdout=self._orders.output(number), stderr=None)
        job_id = self._server.submit(job).id
        self._open.add(job_id)
        return job_id

    async def wait(self, job: int, poll: float, seconds: float) -> float:
        deadline = time.monotonic() + seconds
        while job not in self._over:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is not over after {seconds:g} s")
            self._look([job])
            if job in self._over:
                self._look(sorted(self._open))  # at all others in one question, so that asking takes no time of theirs
            else:
                await asyncio.sleep(poll)
        return self._over[job]

    def _look(self, jobs: Sequence[int]) -> None:
        """Note which are over."""
        for job, status in self._statuses(jobs).items():
            if status["completed"]:
                if status["finished"] != status["total"]:
                    raise RuntimeError(f"job {job} has ended so: {status}")
                self._open.remove(job)
                self._over[job] = time.time()

    def _statuses(self, jobs: Sequence[int]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}

        def see(statuses: dict[int, dict[str, Any]]) -> None:
            found.update(statuses)
            raise _Seen

        with suppress(_Seen):
            self._server.connection.wait_for_jobs(jobs, see)
        return found


class _Seen(Exception):
    """One answer is enough."""


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    with LocalCluster(str(orders.folder / "hq"), WorkerConfig(cores=orders.cpus)) as cluster:
        yield _Client(orders, cluster.client())


if __name__ == "__main__":
    sys.exit(main(client))
