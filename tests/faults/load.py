"""Clients that never stop: submit, wait, now and then cancel or read, and remember everything that they were told."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

from core.states import FINAL
from tests.faults import ledger
from tests.faults.cluster import Cluster
from tests.faults.evidence import Cancel, Sent
from tests.faults.jobs import Wanted, any_of

JOBS = "/api/v1/jobs"
REQUEST_SECONDS = 20.0
RETRY_SECONDS = 0.2
SETTLE_SECONDS = 60.0
"""What a client is given to see its last job to its end."""
POLL_SECONDS = (0.05, 0.8)
CANCELLED, READ, LONG, LISTED = 0.12, 0.15, 0.5, 0.4
"""Of how many jobs a cancel is asked for, the output read, the end waited for by long polls, and which are a list."""

_FINAL = frozenset(state.value for state in FINAL)

Answer = tuple[int, Any]
"""Status and document, or bytes; the status is 0 when the answer did not come."""


@dataclass(slots=True)
class Load:
    """The clients of a run. Made by `loading`."""

    cluster: Cluster
    luck: Random
    session: aiohttp.ClientSession
    make: Callable[[str, Random], Wanted] = any_of
    sent: list[Sent] = field(default_factory=list)
    in_flight: Counter[str] = field(default_factory=Counter)
    """Requests that an API works on."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with every request that writes, as it goes out; to be cleared by whoever waits for one."""
    named: int = 0
    stopping: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def client(self) -> None:
        """One client: job after job until told to stop."""
        while not self.stopping:
            await self.one()

    async def stop(self) -> None:
        """Let every client see its last job to its end: from then on nothing more is asked for."""
        self.stopping = True
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=SETTLE_SECONDS)

    async def one(self, wanted: Wanted | None = None) -> Sent:
        """One job, from its submission to its end."""
        sent = await self.submit(wanted, listed=self.luck.random() < LISTED)
        if sent.job_ids:
            await self.follow(sent)
        return sent

    def new_name(self) -> str:
        """The name of the next job."""
        self.named += 1
        return f"{self.cluster.token}-{self.named}"

    async def submit(self, wanted: Wanted | None = None, *, listed: bool = False) -> Sent:
        """Submit, with one key, until that is answered.

        As a list of one it waits for the scheduler; else it is taken by the first node that has room.
        """
        sent = Sent(wanted or self.make(self.new_name(), self.luck))
        self.sent.append(sent)
        one: dict[str, Any] = {"job": sent.wanted.document(str(self.cluster.ledger)), "script": sent.wanted.script}
        body = {"jobs": [one]} if listed else one
        while True:
            status, document = await self.ask("POST", JOBS, body, {"Idempotency-Key": sent.name})
            if status in (200, 201):
                sent.job_ids.add((document["jobs"][0] if listed else document)["job_id"])
                return sent
            if status not in (0, 503):
                sent.refused = f"{status} {document}"
                return sent
            await asyncio.sleep(RETRY_SECONDS)

    async def follow(self, sent: Sent) -> None:
        """See a job to its end; some are cancelled on the way, and of some the output is read."""
        [job_id] = sent.job_ids
        cancelling = None
        if self.luck.random() < CANCELLED:
            cancelling = asyncio.create_task(self.cancel(sent, self.luck.choice((0.0, 0.02, 0.5, 2.0))))
        try:
            attempts = await self.over(sent)
            if attempts > 1 or self.luck.random() < READ:
                sent.output = await self._output(job_id)
                sent.alone = {n: await self._output(job_id, f"?attempt={n}") for n in range(1, attempts + 1)}
                await self.over(sent)  # and it is left as it was
        finally:
            if cancelling is not None:
                cancelling.cancel()
                await asyncio.gather(cancelling, return_exceptions=True)

    async def over(self, sent: Sent) -> int:
        """Wait for its end, and note it; answer how many attempts it has had."""
        [job_id] = sent.job_ids
        pause, waits = POLL_SECONDS[0], "?wait=5s" if self.luck.random() < LONG else ""
        while True:
            status, job = await self.ask("GET", f"{JOBS}/{job_id}{waits}")
            if status == 200 and job["state"] in _FINAL:
                sent.ends.append((job["state"], job["exit_code"], job["signal"]))
                return int(job["attempt"])
            if status == 404:
                return 0  # accepted, and not there: the verdict will say so
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS[1])

    async def cancel(self, sent: Sent, after: float = 0.0) -> None:
        """Cancel it after some seconds, until that is answered."""
        [job_id] = sent.job_ids
        await asyncio.sleep(after)
        while True:
            status, job = await self.ask("DELETE", f"{JOBS}/{job_id}")
            if status in (200, 202):
                sent.cancels.append(Cancel(job["state"], job["attempt"], ledger.size(self.cluster.ledger)))
                return
            if status not in (0, 503):
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _output(self, job_id: int, query: str = "") -> bytes | None:
        """What is served of it; None when its node is not there to tell."""
        status, output = await self.ask("GET", f"{JOBS}/{job_id}/logs{query}")
        return output if status == 200 and isinstance(output, bytes) else None

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Ask one of the APIs."""
        role = self.luck.choice(self.cluster.of("api"))
        works = "?wait=" not in path
        self.in_flight[role.name] += works
        if method != "GET":
            self.asked.set()
        try:
            async with self.session.request(method, role.address + path, json=body, headers=headers) as answer:
                if "json" in answer.content_type:
                    return answer.status, await answer.json(content_type=None)
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError):
            return 0, None
        finally:
            self.in_flight[role.name] -= works


@asynccontextmanager
async def loading(
    cluster: Cluster,
    luck: Random,
    *,
    clients: int = 0,
    make: Callable[[str, Random], Wanted] = any_of,
) -> AsyncIterator[Load]:
    """So many clients at work, until told to stop, or the end of the block."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        load = Load(cluster, luck, session, make)
        load.tasks += [asyncio.create_task(load.client()) for _ in range(clients)]
        try:
            yield load
        finally:
            for task in load.tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*load.tasks, return_exceptions=True)
