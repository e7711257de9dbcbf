"""Many jobs in one request: ``{"jobs": [{"job": …, "script": …}, …]}``, all of them or none."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from core.errors import Unavailable
from core.records import NewJob
from services.api import idempotency, models
from services.api.problems import MAX_FAULTS, Fault, Problem, unprocessable, within

MAX_JOBS = 10_000
TURN_SECONDS = 0.005
"""For so long it is looked at jobs before others have their turn."""
LARGE_LISTS = 4
"""So many that are larger than a job may be are in work: each is held several times over on its way."""
PATIENCE_SECONDS = 5
"""For which a list waits for others."""


@asynccontextmanager
async def turn(among: asyncio.Lock | asyncio.Semaphore, others: str) -> AsyncIterator[None]:
    """A list's turn, or Unavailable where the others have it for too long."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await among.acquire()
    except TimeoutError:
        raise Unavailable(f"{others} are being stored") from None
    try:
        yield
    finally:
        among.release()


def is_list(document: object) -> bool:
    """Whether a submission is one of many jobs."""
    return isinstance(document, dict) and "jobs" in document


async def new_jobs(document: object, site: models.Site, key: str | None) -> list[NewJob]:
    """The submissions, or Problem 422 with what is wrong with any of them (413: a script that is too large).

    Where much is wrong, that is the first of it. The key, if there is one, is the first one's, and its digest that of
    the whole list.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    jobs: list[NewJob] = []
    faults: list[Fault] = []
    for number, item in enumerate(_items(document)):
        try:
            jobs.append(models.new_job(item, site, key))
            if key is not None and jobs[-1].account != jobs[0].account:
                faults.append(_another_account(number, jobs[0].account))
        except Problem as problem:
            if problem.status != 422:
                raise Problem(problem.status, problem.detail, faults=within(number, problem.faults)) from None
            faults += within(number, problem.faults)
        if len(faults) > MAX_FAULTS:
            break
        if loop.time() - began > TURN_SECONDS:
            await asyncio.sleep(0)
            began = loop.time()
    if faults:
        raise unprocessable(faults)
    return jobs if key is None else [_first(jobs, key), *(replace(job, key=None, digest=None) for job in jobs[1:])]


def _items(document: object) -> list[object]:
    assert isinstance(document, dict)
    models.check_count(document, "")
    faults = [Fault("unknown field beside jobs", models.pointer((name,))) for name in document if name != "jobs"]
    items = document["jobs"]
    if not isinstance(items, list):
        faults.append(Fault('should be a list of {"job": {…}, "script": "…"}', "/jobs"))
    elif not 1 <= len(items) <= MAX_JOBS:
        faults.append(Fault(f"should hold 1 to {MAX_JOBS} jobs, and holds {len(items)}", "/jobs"))
    if faults:
        raise unprocessable(faults)
    found: list[object] = items
    return found


def _another_account(number: int, account: str) -> Fault:
    detail = f"differs from {account}: the {idempotency.HEADER} of a list belongs to one account"
    return Fault(detail, f"/jobs/{number}/job/account")


def _first(jobs: Sequence[NewJob], key: str) -> NewJob:
    return replace(jobs[0], key=key, digest=idempotency.digest_of_list([job.digest or b"" for job in jobs]))
