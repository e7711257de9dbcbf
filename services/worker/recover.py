"""Recover: what an earlier worker of this node left running is found again, before anything new starts."""

from collections.abc import Iterable
from functools import partial

import structlog

from core import crash
from core.cancellation import pause
from core.db import allocations, jobs, nodes
from core.db.connection import CONNECTION_ERRORS, RETRY_SECONDS, describe
from core.loss import MARGIN
from core.records import Attempt, JobSpec
from core.states import State
from services.worker import files, keeper, proc, process
from services.worker.environment import MARK, mark, read_mark, tag_of_mark
from services.worker.node import Begin, Node, Run
from services.worker.process import Adopted
from services.worker.spool import UNKNOWN, Leader


async def recover(node: Node, begin: Begin) -> None:
    """Take over every attempt that the tables call RUNNING here; then the node is `recovered`.

    Nobody else starts anything of this spool meanwhile: the caller holds its lock. The order of effects of a start
    is commit (of a restart a second one: where its output begins), script file, process. So an attempt

    - whose process or record is there, is adopted;
    - that this spool was to start in this boot, and without a script file, has never been started: it is started
      now, in the same attempt. So is one with a script file, if its worker's keeper would know of any process;
    - else may have run, and is not run again. What says so, its script file, stays until its end is committed.

    What is left of any other attempt is ended.
    """
    specs = await _running(node)
    same_boot, leaders = node.spool.is_of_this_boot(), _leaders()
    runs = [_taken_over(node, spec, leaders, same_boot=same_boot) for spec in specs]
    for run in runs:
        if run.lost is not None:
            files.script_path(node.spool.script_dir, run.spec.job_id, run.spec.attempt).touch()
    node.spool.forget_dead()
    if not same_boot:
        node.spool.begin_boot()
    for run in runs:
        begin(run)
    crash.here("worker.recovered")
    await _end_stale(node, {run.attempt for run in runs})
    _tidy(node, specs)
    node.recovered = True


async def _running(node: Node) -> list[JobSpec]:
    """The specifications of what is RUNNING here, however long PostgreSQL is away."""
    log, said = structlog.get_logger(), ""
    while True:
        try:
            async with node.pool.acquire() as connection:
                held = await allocations.of_node(connection, node.name)
                attempts = [Attempt(h.job_id, h.attempt) for h in held if h.state is State.RUNNING]
                specs = await jobs.running(connection, attempts, node=node.name, incarnation=node.incarnation)
                # Asked last: a worker that was replaced before finds nothing, and would take all that runs for stale.
                if await nodes.is_current(connection, node.name, node.incarnation):
                    return specs
            node.beat.set()  # the heartbeat ends this worker
        except CONNECTION_ERRORS as error:
            if (problem := describe(error)) != said:
                log.warning("recovery_waits", error=problem)
                said = problem
        await pause(RETRY_SECONDS)


def _leaders() -> dict[int, list[Leader]]:
    """Every session leader by the tag that it bears, or that its mark says it had: alive, or dead and not reaped."""
    found: dict[int, list[Leader]] = {}
    for pid in proc.all_pids():
        stat = proc.read_stat(pid)
        if stat is None or stat.session != pid:
            continue
        for tag in {proc.read_tag(pid), tag_of_mark(proc.read_variable(pid, MARK))} - {None}:
            found.setdefault(tag, []).append(Leader(stat.start, pid))  # type: ignore[arg-type]
    return found


def _taken_over(node: Node, spec: JobSpec, leaders: dict[int, list[Leader]], *, same_boot: bool) -> Run:
    log = structlog.get_logger().bind(job_id=spec.job_id, attempt=spec.attempt, node=node.name)
    tag = node.tag(spec)
    candidates: list[Leader] = [*leaders.get(tag, []), *(node.spool.recorded(tag) if same_boot else [])]
    script_path = files.script_path(node.spool.script_dir, spec.job_id, spec.attempt)
    note = files.note_on(script_path) if same_boot and spec.ours else None
    if candidates or note is not None:
        leader = min(candidates) if note is None else _started_as(node, note.pid, candidates)
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
        ended = note.why if note is not None else None
        if ended is None and same_boot and node.spool.ended_in_silence(tag):
            ended = files.Why.SILENCE
        return Run(spec, script, started=proc.seconds_since(leader.start), why=ended)
    if why := _why_it_may_have_run(node, spec, same_boot=same_boot):
        log.warning("job_lost", why=why)
        return Run(spec, lost=why, may_run_for=0.0 if spec.ours or not spec.requeue else _silence_of_another(node))
    log.info("job_never_started")
    return Run(spec)


def _started_as(node: Node, pid: int, candidates: list[Leader]) -> Leader:
    """The script itself, which was started as this process. Whatever else bears its tag was begun by it.

    It may have taken off its tag, alive or dead; and it may be gone without a record, while what it began lives on.
    """
    known = [*candidates, *node.spool.recorded(UNKNOWN)]
    stat = proc.read_stat(pid)
    if stat is not None and stat.session == pid and node.spool.keeps(stat.parent) and proc.read_tag(pid) is None:
        known.append(Leader(stat.start, pid))
    return next((leader for leader in known if leader.pid == pid), Leader(0, pid))


def _why_it_may_have_run(node: Node, spec: JobSpec, *, same_boot: bool) -> str | None:
    if not spec.ours:
        return "another worker of this node's name, with another SCRIPT_DIR, was running it"
    if not same_boot:
        return "the node was started anew"
    if _somebody_is_unknown(node):
        return "its worker was killed, and a script on this node took off what says whose it is"
    script = files.script_path(node.spool.script_dir, spec.job_id, spec.attempt)
    if script.exists() and not _would_be_known(node, spec):
        return "its worker was killed, and it left neither process nor exit record"
    return None


def _somebody_is_unknown(node: Node) -> bool:
    """Whether there is, or was, a script here of which nobody can tell whose it is: it might be anybody's.

    The processes first: a keeper that reaps one of them meanwhile has written its record before.
    """
    for keeper_pid in node.spool.keepers():
        for pid in proc.children(keeper_pid):
            stat = proc.read_stat(pid)
            bare = proc.read_tag(pid) is None and proc.read_variable(pid, MARK) is None
            if stat is not None and stat.session == pid and bare:
                return True
    return any(node.spool.recorded(UNKNOWN))


def _would_be_known(node: Node, spec: JobSpec) -> bool:
    """Whether an attempt that left neither process nor record was never started: its worker died right before.

    So it is when the keeper is the same one ever since, and lives: it reaps nothing without a record.
    """
    if spec.incarnation < node.kept_since:
        return False
    tag = node.tag(spec)
    return not any(proc.read_tag(pid) == tag for pid in proc.all_pids()) and (
        not any(node.spool.recorded(tag)) and keeper.lives()
    )


async def _end_stale(node: Node, current: set[Attempt]) -> None:
    """End what runs on of attempts that ended while no worker was here: the node was called lost, or DOWN.

    They are known by their scripts, which lie there until this is done; one that removed its own, by its mark.
    """
    spool_id = node.host.spool_id
    marks = (read_mark(proc.read_variable(pid, MARK)) for pid in proc.all_pids())
    marked = {Attempt(named[0], named[1]) for named in marks if named is not None and named[2] == spool_id}
    for attempt in (marked | files.scripts_of(node.spool.script_dir)) - current:
        if await process.end_stale(node.tag(attempt), mark(attempt.job_id, attempt.attempt, spool_id)):
            structlog.get_logger().warning("job_fenced", job_id=attempt.job_id, attempt=attempt.attempt)


def _silence_of_another(node: Node) -> float:
    """The worker that had this node's name, elsewhere, has ended what may be requeued when so much has passed."""
    return node.settings.requeue_after + node.settings.kill_grace_seconds + MARGIN.total_seconds()


def _tidy(node: Node, specs: Iterable[JobSpec]) -> None:
    """Remove scripts, records and grants of attempts that are over."""
    kept = {files.script_path(node.spool.script_dir, spec.job_id, spec.attempt).name for spec in specs}
    for path in (*node.spool.script_dir.glob("job-*"), *node.spool.script_dir.glob(f"{files.SPARE}*")):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    tags = {node.tag(spec) for spec in specs}
    if node.runs:
        tags.add(UNKNOWN)  # how one of them ended, or what says that they may have run, until that is committed
    for tag in node.spool.recorded_tags() - tags:
        node.spool.remove_records(tag)
    for tag in node.spool.granted_tags() - tags:
        node.spool.end_grant(tag)
