"""Claim: attempts allocated to this node are moved to RUNNING, and launched; what the tables say is obeyed."""

import asyncio
from collections.abc import Sequence

import structlog

from core import crash
from core.db import allocations, jobs
from core.db.connection import CONNECTION_ERRORS
from core.records import Attempt
from core.states import State
from core.streams import Reader
from services.worker import report
from services.worker.node import Begin, Node, Run

BATCH = 200


async def consume_once(node: Node, reader: Reader, begin: Begin) -> int:
    """Read the stream, start what it speaks of, and acknowledge after that commit."""
    messages = await reader.read(BATCH)
    crash.here("worker.read")
    try:
        await start(node, [message.attempt for message in messages if message.kind == "run"], begin)
        if any(message.kind == "take" for message in messages):
            await report.take(node, begin)
        if any(message.kind == "cancel" for message in messages):
            node.look.set()
        crash.here("worker.launched")
        reader.done([message.entry_id for message in messages])
    except BaseException:
        reader.replay()
        raise
    await asyncio.sleep(0)  # the scripts first: what comes while they are launched is one batch, and one commit
    return 1  # the read itself waits


async def start(node: Node, attempts: Sequence[Attempt], begin: Begin) -> None:
    """Move attempts to RUNNING and launch those that moved; stale, repeated and forged ones do not."""
    if not attempts or node.draining:
        return
    async with node.claiming:
        async with node.line.acquire() as connection:
            if node.is_silent:  # asked now: both may have been waited for
                return
            try:
                specs = await jobs.start(connection, attempts, node=node.name, incarnation=node.incarnation)
            except CONNECTION_ERRORS:
                node.look.set()  # the commit may have happened: the tables know
                raise
        crash.here("worker.started")
        for spec in specs:
            begin(Run(spec))
        for spec in specs:  # after all of them: they are launched before anybody is told
            node.moves.add(spec.job_id, State.RUNNING)


async def look_once(node: Node, begin: Begin) -> int:
    """Compare the tables with what runs here: start what was missed, end what was cancelled or is not ours any more."""
    async with node.claiming, node.line.acquire() as connection:
        held = {Attempt(h.job_id, h.attempt): h for h in await allocations.of_node(connection, node.name)}
        lost = [a for a, h in held.items() if h.state is State.RUNNING and a not in node.runs]
        # Read again: a run leaves `runs` only after the commit that ends it, so what is RUNNING in a second look
        # and still not here was started by a commit whose answer never came. It has not been launched.
        specs = await jobs.running(connection, lost, node=node.name, incarnation=node.incarnation) if lost else []
        for spec in specs:
            if Attempt(spec.job_id, spec.attempt) not in node.runs and not node.is_silent:
                begin(Run(spec))
    for attempt, run in list(node.runs.items()):
        holding = held.get(attempt)
        if holding is not None and holding.cancel_requested:
            run.cancel()
        elif holding is None and not run.over and not await _is_current(node, attempt) and not run.over:
            structlog.get_logger().warning("job_fenced", job_id=attempt.job_id, attempt=attempt.attempt)
            run.fence()
    waiting = [attempt for attempt, h in held.items() if h.state is State.CONFIGURING]
    await start(node, waiting, begin)
    return 0


async def _is_current(node: Node, attempt: Attempt) -> bool:
    """Whether a run is still the one that the tables know, asked anew: it may have begun after the look."""
    async with node.pool.acquire() as connection:
        job = await jobs.get(connection, attempt.job_id)
    return job is not None and job.state is State.RUNNING and job.attempt == attempt.attempt
