"""Report: the ends, or restarts, that piled up are written in one statement, however long PostgreSQL is away.

The statement that ends jobs gives their CPUs to the next ones, which begin here at once.
"""

from collections.abc import Sequence
from contextlib import suppress

import asyncpg
import structlog

from core import crash
from core.cancellation import pause
from core.db import allocations, jobs, nodes, outputs
from core.db.connection import CONNECTION_ERRORS, RETRY_SECONDS, Connection, describe, notify
from core.records import Attempt, Ending, Output
from core.states import FINAL, State
from services.worker.node import Begin, Node, Run

BATCH = 500


async def write_endings(node: Node, endings: Sequence[Ending], begin: Begin) -> list[bool]:
    """End attempts, return their CPUs, and begin what got them; False for an end that was not current any more.

    Tried until PostgreSQL says what became of each. A compare-and-set may be written again after a connection that
    broke at the commit: what it does not find any more is read back. A worker that is not its node's any more writes
    nothing, and nothing is over for it: the heartbeat ends it, and its successor finds everything as it is.
    """
    said, unsure = False, False
    while True:
        try:
            turned = await _turn_over(node, endings, begin)
            ended = turned.ended
            refused = [e for e in endings if Attempt(e.job_id, e.attempt) not in ended]
            if not refused:
                break
            async with node.pool.acquire() as connection:
                if unsure:
                    ended |= await _written_before(connection, refused)
                if await nodes.is_current(connection, node.name, node.incarnation):
                    break
            node.beat.set()
        except CONNECTION_ERRORS as error:
            unsure = True
            if not said:
                structlog.get_logger().warning("report_waits", jobs=len(endings), error=describe(error))
                said = True
        await pause(RETRY_SECONDS)
    written = [Attempt(ending.job_id, ending.attempt) in ended for ending in endings]
    for ending, is_written in zip(endings, written, strict=True):
        if is_written:
            node.moves.add(ending.job_id, ending.state)
    if turned.free_cpus != 0:
        with suppress(*CONNECTION_ERRORS):  # a hint that is lost costs a poll of the scheduler's
            async with node.pool.acquire() as connection:
                await notify(connection)
    return written


async def take(node: Node, begin: Begin) -> None:
    """Begin what waits, as far as it fits; what is left is the scheduler's, and it hears of it."""
    if (await _turn_over(node, (), begin)).left_some:
        async with node.pool.acquire() as connection:
            await notify(connection)


async def _turn_over(node: Node, endings: Sequence[Ending], begin: Begin) -> allocations.TurnOver:
    """One try. Until what it has started is among the runs, nobody looks at the tables."""
    async with node.claiming, node.line.acquire() as connection:
        try:
            turned = await _write(connection, node, endings)
        except CONNECTION_ERRORS:
            node.look.set()  # the commit may have happened: the tables know what it has started
            raise
        crash.here("worker.turned")
        for spec in turned.begun:
            begin(Run(spec))
        for spec in turned.begun:  # after all of them: they are launched before anybody is told
            node.moves.add(spec.job_id, State.RUNNING)
        node.taken.add(turned.begun)
    return turned


async def _write(connection: Connection, node: Node, endings: Sequence[Ending]) -> allocations.TurnOver:
    """What goes back to the queue, with all that is reported beside it, does not come back in the same moment."""
    name, incarnation = node.name, node.incarnation
    if all(ending.state in FINAL for ending in endings):
        take = node.recovered and not node.draining and node.trouble is None and not node.is_silent
        try:
            return await allocations.turn_over(connection, endings, node=name, incarnation=incarnation, take=take)
        except asyncpg.IntegrityConstraintViolationError as error:
            structlog.get_logger().error("take_refused", node=name, error=describe(error))  # whatever ends, ends
            return await allocations.turn_over(connection, endings, node=name, incarnation=incarnation, take=False)
    ended = await allocations.release(connection, endings, node=name, before=State.RUNNING, incarnation=incarnation)
    return allocations.TurnOver(ended, begun=[], free_cpus=None)


async def _written_before(connection: Connection, endings: Sequence[Ending]) -> set[Attempt]:
    """Which endings a commit whose answer was lost has written: the job is over, in this attempt, in just this way."""
    found = set()
    for ending in endings:
        job = await jobs.get(connection, ending.job_id)
        how = (None, None) if ending.state is State.PENDING else (ending.exit_code, ending.signal)
        told = (ending.attempt, ending.state, *how)
        if job is not None and (job.attempt, job.state, job.exit_code, job.signal) == told:
            found.add(Attempt(ending.job_id, ending.attempt))
    return found


async def write_outputs(node: Node, begun: Sequence[Output]) -> list[bool]:
    """Store where the outputs of restarts begin; False for an attempt that is not current any more, or not ours.

    Tried until PostgreSQL says so: a script starts after that.
    """
    said = False
    while True:
        try:
            async with node.pool.acquire() as connection:
                stored = await outputs.store(connection, begun, node=node.name, incarnation=node.incarnation)
            return [Attempt(output.job_id, output.attempt) in stored for output in begun]
        except CONNECTION_ERRORS as error:
            if not said:
                structlog.get_logger().warning("start_waits", jobs=len(begun), error=describe(error))
                said = True
        await pause(RETRY_SECONDS)
