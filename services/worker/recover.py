"""Recover: what an earlier worker of this node left running is found again, before anything new starts."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

import structlog

from core.db import allocations, jobs
from core.db.connection import CONNECTION_ERRORS, RETRY_SECONDS, describe
from core.records import Attempt, JobSpec
from core.states import State
from services.worker import files, proc
from services.worker.environment import mark
from services.worker.node import Node, Run
from services.worker.process import Adopted
from services.worker.spool import Leader

Begin = Callable[[Run], None]


async def recover(node: Node, begin: Begin) -> bool:
    """Take over every attempt that the tables call RUNNING here; True when that is done.

    Nobody else starts anything of this spool meanwhile: the caller holds its lock. The order of effects of a start
    is commit, script file, process. So an attempt

    - whose process or record is there, is adopted;
    - without a script file has never been started, and is started now, in the same attempt;
    - with a script file, but neither process nor record, has never been started either, as long as no keeper was
      killed and the machine is the same boot: they would have told. Else it may have run, and is not run again.
    """
    specs = await _running(node)
    same_boot, lost = node.spool.is_of_this_boot(), node.spool.lost_keepers()
    leaders = _leaders() if same_boot else {}
    runs = [_taken_over(node, spec, leaders, certain=same_boot and not lost, same_boot=same_boot) for spec in specs]
    _tidy(node, specs)
    if not same_boot:
        node.spool.begin_boot()
    node.uncertain = set() if not lost else {run.attempt for run in runs}
    node.forget_lost_keepers()
    for run in runs:
        begin(run)
    return True


async def _running(node: Node) -> list[JobSpec]:
    """The specifications of what is RUNNING here, however long PostgreSQL is away."""
    log, said = structlog.get_logger(), ""
    while True:
        try:
            async with node.pool.acquire() as connection:
                held = await allocations.of_node(connection, node.name)
                attempts = [Attempt(h.job_id, h.attempt) for h in held if h.state is State.RUNNING]
                return await jobs.running(connection, attempts, node=node.name, incarnation=node.incarnation)
        except CONNECTION_ERRORS as error:
            if (problem := describe(error)) != said:
                log.warning("recovery_waits", error=problem)
                said = problem
            await asyncio.sleep(RETRY_SECONDS)


def _leaders() -> dict[int, list[Leader]]:
    """Every session leader with a tag, by the tag: alive, or dead and not reaped."""
    found: dict[int, list[Leader]] = {}
    for pid in proc.all_pids():
        stat = proc.read_stat(pid)
        if stat is not None and stat.session == pid and (tag := proc.read_tag(pid)) is not None:
            found.setdefault(tag, []).append(Leader(stat.start, pid))
    return found


def _taken_over(node: Node, spec: JobSpec, leaders: dict[int, list[Leader]], *, certain: bool, same_boot: bool) -> Run:
    log = structlog.get_logger().bind(job_id=spec.job_id, attempt=spec.attempt, node=node.name)
    tag = proc.tag_of(spec.job_id, spec.attempt, node.host.spool_id)
    candidates: list[Leader] = [*leaders.get(tag, []), *(node.spool.recorded(tag) if same_boot else [])]
    if candidates:
        leader = min(candidates)  # whatever else leads a session with this tag was begun by the script
        log.info("job_adopted", pid=leader.pid)
        script = Adopted(
            leader.pid,
            leader.start,
            tag,
            mark(spec.job_id, spec.attempt, node.host.spool_id),
            record=partial(node.spool.record, tag, leader),
            remove_records=partial(node.spool.remove_records, tag),
            kept_by=node.spool.keeps,
        )
        return Run(spec, script, started=proc.seconds_since(leader.start))
    if certain or (same_boot and not files.script_path(node.spool.script_dir, spec.job_id, spec.attempt).exists()):
        log.info("job_never_started")
        return Run(spec)
    lost = "its worker and their keeper were both killed" if same_boot else "the node was started anew"
    log.warning("job_lost", why=lost)
    return Run(spec, lost=lost)


def _tidy(node: Node, specs: Iterable[JobSpec]) -> None:
    """Remove scripts and records of attempts that are over."""
    kept = {files.script_path(node.spool.script_dir, spec.job_id, spec.attempt).name for spec in specs}
    for path in node.spool.script_dir.glob("job-*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    tags = {proc.tag_of(spec.job_id, spec.attempt, node.host.spool_id) for spec in specs}
    for tag in node.spool.recorded_tags() - tags:
        node.spool.remove_records(tag)
