"""The asyncio worker: registers its node, consumes its stream, supervises scripts, serves their output."""

import asyncio
import resource
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

import structlog

from core import streams
from core.batch import Batcher
from core.db import nodes
from core.db.connection import CONNECTION_ERRORS, describe, notify
from core.duty import NEVER, repeat
from core.errors import SettingsError
from core.records import Ending, Output
from core.settings import Settings, without_secrets
from core.wakeup import Wakeup
from services.worker import claim, health, keeper, proc, process, report
from services.worker.node import Begin, Node, Run, Superseded, heartbeat_once, join
from services.worker.recover import recover
from services.worker.spool import Spool
from services.worker.supervise import supervise

# What a stop may take beyond the jobs' own grace period: killing, sweeping, and the last report.
STOP_SECONDS = 15
# Before that, and only while PostgreSQL is silent: for a start under way, which may take the whole of a command.
LAST_LOOK_SECONDS = 20
TIDY_SECONDS = 30
SILENCE_LOOK_SECONDS = 1


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run this node until told to stop, then drain: nothing new starts. Jobs run on, unless END_JOBS says otherwise."""
    process.become_subreaper()
    if resource.getrlimit(proc.TAG_LIMIT)[1] != resource.RLIM_INFINITY:
        raise SettingsError("ulimit -H -x: the hard limit of file locks should be unlimited: jobs are tagged by it")
    settings.work_base_dir.mkdir(parents=True, exist_ok=True)
    spool = Spool(settings.scripts_dir)
    identity = spool.open()
    keeper.tell(settings.scripts_dir)
    async with AsyncExitStack() as stack:
        node = await _unless(stop, join(settings, spool, identity, stack))
        if node is not None:
            await _work(node, stop)


async def _unless(stop: asyncio.Event, doing: Coroutine[Any, Any, Any]) -> Any:
    """What `doing` answers, or None when told to stop before."""
    done, stopped = asyncio.ensure_future(doing), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((done, stopped), return_when=asyncio.FIRST_COMPLETED)
        return await done if done.done() else None
    finally:
        for future in (done, stopped):
            future.cancel()
        await asyncio.gather(done, stopped, return_exceptions=True)


async def _work(node: Node, stop: asyncio.Event) -> None:
    settings, poll = node.settings, node.settings.poll_seconds
    reports: Batcher[Ending, bool] = Batcher(lambda endings: report.write_endings(node, endings, begin), report.BATCH)
    measures: Batcher[Output, bool] = Batcher(lambda outputs: report.write_outputs(node, outputs), report.BATCH)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        client = streams.connect(settings)
        stack.push_async_callback(client.aclose)
        reader, link = streams.Reader(client, node.name), streams.Link(client)
        node.moves.wanted = lambda: reader.somebody_listens

        supervisions: set[asyncio.Task[None]] = set()

        def begin(run: Run) -> None:
            if node.draining:  # taken as the stop was said: it does not start
                run.stop()
            node.runs[run.attempt] = run
            task = group.create_task(supervise(node, run, reports, measures))
            supervisions.add(task)
            task.add_done_callback(supervisions.discard)

        heartbeat = group.create_task(
            repeat("heartbeat", lambda: _beat_once(node), node.beat, settings.heartbeat_seconds)
        )
        lasting = [
            repeat("silence", lambda: health.end_after_silence_once(node), Wakeup(), SILENCE_LOOK_SECONDS),
            repeat("tidy", _tidy_once, Wakeup(), TIDY_SECONDS),
            repeat("tell", lambda: node.moves.tell_once(link), node.moves.wake, NEVER),
            repeat("taken", lambda: node.taken.tell_once(node.pool, node.name), node.taken.filled, NEVER),
            reports.run(),
            measures.run(),
        ]
        duties = [group.create_task(duty) for duty in lasting]
        starts = []
        await _unless(stop, recover(node, begin))
        if node.recovered:
            starting = [
                streams.name_when_away(client, without_secrets(settings.redis_dsn)),
                repeat("consume", lambda: claim.consume_once(node, reader, begin), Wakeup(), poll),
                repeat("look", lambda: claim.look_once(node, begin), node.look, poll),
                repeat("health", lambda: health.look_once(node), Wakeup(), settings.heartbeat_seconds),
            ]
            starts = [group.create_task(duty) for duty in starting]
        await stop.wait()
        node.draining = True
        node.beat.set()
        if node.recovered:
            await _look_for_starts(node, begin)
        for task in starts:
            task.cancel()
        await _drain(node, heartbeat)
        for task in [*duties, *supervisions]:
            task.cancel()


async def _look_for_starts(node: Node, begin: Begin) -> None:
    """Give back jobs whose start is on its way, or whose answer was lost.

    Cut off, they would be RUNNING for ever where no worker comes back.
    """
    try:
        async with asyncio.timeout(LAST_LOOK_SECONDS):
            await claim.look_once(node, begin)
    except CONNECTION_ERRORS as error:
        structlog.get_logger().warning("starts_not_looked_for", error=describe(error))


async def _beat_once(node: Node) -> int:
    """Prolong the lease. A worker on another machine that took the name took the jobs, too: then they end here."""
    await health.end_after_silence_once(node)  # of one that was frozen: before the answer makes it forget for how long
    try:
        return await heartbeat_once(node)
    except Superseded as taken:
        if taken.elsewhere:
            node.draining = True  # what a report has taken, and does not know of yet, does not start here
            for run in node.runs.values():
                run.fence()
            await _until_idle(node)
        raise


async def _drain(node: Node, heartbeat: asyncio.Task[None]) -> None:
    """What has ended is reported; what runs goes on, or gets SIGTERM and its grace period."""
    log = structlog.get_logger()
    ending = node.settings.end_jobs
    log.info("worker_drains", jobs=len(node.runs), end_jobs=ending)
    for run in node.runs.values():
        if ending:
            run.stop()
    try:
        await _until_idle(node, all_of_them=ending)
        heartbeat.cancel()  # or the one under way would take back what is given up
        await asyncio.wait((heartbeat,))
        async with asyncio.timeout(STOP_SECONDS), node.pool.acquire() as connection:
            await nodes.give_up_lease(connection, node.name, node.incarnation)
            await notify(connection)
    except CONNECTION_ERRORS:
        log.warning("lease_not_given_up", jobs=len(node.runs))
    log.info("worker_drained", jobs_left_running=len(node.runs))


async def _until_idle(node: Node, *, all_of_them: bool = True) -> None:
    """Wait, not for ever, until no run is left, or none that has ended already."""
    with suppress(TimeoutError):
        async with asyncio.timeout(node.settings.kill_grace_seconds + STOP_SECONDS):
            while any(all_of_them or run.over for run in node.runs.values()):
                node.changed.clear()
                await node.changed.wait()


async def _tidy_once() -> int:
    process.reap_orphans()
    return 0
