"""The run of one attempt, as a pipeline: prepare, start, wait, end, report, clean up."""

import asyncio
import errno
from contextlib import suppress
from dataclasses import replace

import structlog
from structlog.typing import FilteringBoundLogger

from core import crash
from core.batch import Batcher
from core.cancellation import raise_if_cancelled
from core.db.connection import CONNECTION_ERRORS
from core.records import Ending, JobSpec, Output
from core.states import Reason, State
from services.worker import files, health, process
from services.worker.environment import MARK
from services.worker.launch import command_and_environment, paths_of
from services.worker.node import FIRST_TROUBLE_SECONDS, Node, Run
from services.worker.spool import Exit

Report = Batcher[Ending, bool]
Measure = Batcher[Output, bool]

# A disk or a table of processes that is full: not the job's fault, and over some time.
NODE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


async def supervise(node: Node, run: Run, report: Report, measure: Measure) -> None:
    """Run one attempt to its end; it stays in `node.runs` until the commit that ends it.

    Cancelled, it leaves everything as it is: the script runs on, and the next worker finds it.
    """
    spec = run.spec
    log = structlog.get_logger().bind(job_id=spec.job_id, attempt=spec.attempt, node=node.name)
    ending = await attempt(node, run, log, measure)
    run.over = True
    if not ending.ran:
        with suppress(*CONNECTION_ERRORS):
            await health.look_once(node)  # first: or the job would be placed here again at once
        raise_if_cancelled()
    crash.here("worker.ended")
    ended = not run.fenced and await report.do(ending)
    crash.here("worker.reported")
    if run.script is not None:
        run.script.forget()
    crash.here("worker.forgotten")
    with suppress(OSError):  # a disk that takes no changes; the next worker tries again
        node.scripts.remove(spec.job_id, spec.attempt)
    node.end(run)
    if not ended:
        node.stale_writes_refused += 1
        log.warning("job_end_refused", state=ending.state)
        return
    log.info("job_ended", state=ending.state, reason=ending.reason, exit_code=ending.exit_code, signal=ending.signal)
    log.info("job_released", cpus=spec.cpus)


async def attempt(node: Node, run: Run, log: FilteringBoundLogger, measure: Measure) -> Ending:
    """Prepare, start, wait and end; nothing of the job is left when this returns."""
    if run.lost is not None:
        await asyncio.sleep(run.may_run_for)
        return _gone(node, run, f"it may have run, and nobody can tell how it ended: {run.lost}")
    if run.script is None:
        try:
            if not await _may_start(node, run, measure):
                if run.cancelled:
                    return replace(_ending(run.spec, State.CANCELLED, Reason.NONE), ran=False)
                return _unstarted(run.spec, f"the worker of node {node.name} was stopped before it could start it")
            run.script = await _start(node, run.spec)
            crash.here("worker.spawned")
            log.info("job_started", name=run.spec.name, account=run.spec.account, cpus=run.spec.cpus)
            node.trouble_seconds = FIRST_TROUBLE_SECONDS
        except (process.LaunchShortage, OSError) as error:
            return _not_started(node, run, error)
        except (files.FileRefused, process.LaunchFailed, ValueError) as error:
            return _ending(run.spec, State.FAILED, Reason.JOB_LAUNCH_FAILURE, description=str(error))
    try:
        run.why = run.why or await _wait(run, run.script) or _why_of_keeper(node, run.spec)
        verdict = None
        if run.why is not None:
            verdict = _verdict(node, run, run.why)
            path = files.script_path(node.spool.script_dir, run.spec.job_id, run.spec.attempt)
            files.note_end(path, run.script.pid, run.why)
            crash.here("worker.noted")
            await process.end(run.script, node.settings.kill_grace_seconds)
        await process.sweep(run.script)
        exit_ = await run.script.wait()
    except process.ExitLost as error:
        await process.sweep(run.script)
        return _gone(node, run, str(error))
    return replace(verdict or _verdict_of_exit(run.spec, exit_), exit_code=exit_.exit_code, signal=exit_.signal)


def _not_started(node: Node, run: Run, error: OSError | process.LaunchShortage) -> Ending:
    """The job goes back when the node is at fault, which then takes no more until it has what it lacks."""
    if isinstance(error, OSError) and error.errno not in NODE_ERRORS:
        return _ending(run.spec, State.FAILED, Reason.JOB_LAUNCH_FAILURE, description=str(error))
    problem = f"a job could not be started: {error}"
    health.found(node, problem)
    return _unstarted(run.spec, problem)


def _unstarted(spec: JobSpec, why: str) -> Ending:
    """It waits for resources again. By this reason its attempt is known later for one that wrote nothing."""
    return replace(_ending(spec, State.PENDING, Reason.RESOURCES, description=why), ran=False)


def _gone(node: Node, run: Run, why: str) -> Ending:
    """An attempt that ended with its node, or its worker: again, where that was granted."""
    if run.spec.requeue and not run.cancelled:
        return _ending(run.spec, State.PENDING, Reason.NONE, description=f"requeued: {why}")
    return _ending(run.spec, State.NODE_FAIL, Reason.SYSTEM_FAILURE, description=why)


def _why_of_keeper(node: Node, spec: JobSpec) -> files.Why | None:
    """Whether a keeper has ended it meanwhile: this worker was frozen."""
    return files.Why.SILENCE if spec.requeue and node.spool.ended_in_silence(node.tag(spec)) else None


async def _may_start(node: Node, run: Run, measure: Measure) -> bool:
    """Whether what was committed as started, by this worker or an earlier one, is to be started still."""
    if run.cancelled or run.stopped:
        return False
    return run.spec.restart_cnt == 0 or await _measured(node, run, measure)


async def _measured(node: Node, run: Run, measure: Measure) -> bool:
    """Store where the output of a restart begins; False when it is not to be started any more.

    Measured before the files are opened: what is not there yet must not have been made by this. Its time limit is that
    of its script, and does not run yet; a stop and a cancel are not kept waiting by a PostgreSQL that is away.
    """
    spec, paths = run.spec, paths_of(node.settings, node.host, run.spec)
    begins = [files.length(node.roots, path) for path in (paths.standard_output, paths.standard_error)]
    with suppress(TimeoutError):
        async with run.patience(None):
            current = await measure.do(Output(spec.job_id, spec.attempt, spec.restart_cnt, *begins))
        crash.here("worker.measured")
        if not current:
            run.fence()
        return current
    return False


async def _start(node: Node, spec: JobSpec) -> process.Process:
    paths = paths_of(node.settings, node.host, spec)
    append = spec.restart_cnt > 0
    with files.Places(node.roots) as places:
        directory = places.folder(paths.working_directory)
        stdout = places.output(paths.standard_output, append=append)
        stderr = places.output(paths.standard_error, append=append)
        if spec.requeue:
            node.spool.grant(node.tag(spec))
            crash.here("worker.granted")
        # Last: from here to the start lies what a worker that is killed cannot tell from a script that ran.
        script = node.scripts.write(spec.job_id, spec.attempt, spec.script)
        crash.here("worker.written")
        command, environment = command_and_environment(node.host, spec, paths, script)
        try:
            started = await process.start(
                command,
                env=environment,
                cwd=directory,
                stdout_fd=stdout,
                stderr_fd=stderr,
                tag=node.tag(spec),
                mark=environment[MARK],
            )
        except process.LaunchFailed as error:
            if error.pid is not None:
                files.note_start(script, error.pid)
            raise
    files.note_start(script, started.pid)
    return started


async def _wait(run: Run, script: process.Script) -> files.Why | None:
    """Wait for the script's own end (None), its time limit, its cancel, or the worker's stop."""
    limit = run.spec.time_limit_seconds
    with suppress(TimeoutError):
        async with run.patience(None if limit is None else limit - run.started):
            await script.wait()
        return None
    return _why(run)


def _why(run: Run) -> files.Why:
    """Why it is ended, when it has not ended by itself."""
    return files.Why.CANCEL if run.cancelled else files.Why.STOP if run.stopped else files.Why.TIME_LIMIT


def _verdict(node: Node, run: Run, why: files.Why) -> Ending:
    if why is files.Why.TIME_LIMIT:
        return _ending(run.spec, State.TIMEOUT, Reason.TIME_LIMIT)
    if why is files.Why.CANCEL or run.cancelled:
        return _ending(run.spec, State.CANCELLED, Reason.NONE)
    silent, stopped = "its node did not hear PostgreSQL for too long", f"the worker of node {node.name} was stopped"
    return _gone(node, run, silent if why is files.Why.SILENCE else stopped)


def _verdict_of_exit(spec: JobSpec, exit_: Exit) -> Ending:
    if exit_.signal is not None:
        return _ending(spec, State.FAILED, Reason.RAISED_SIGNAL)
    if exit_.exit_code:
        return _ending(spec, State.FAILED, Reason.NON_ZERO_EXIT_CODE)
    return _ending(spec, State.COMPLETED, Reason.NONE)


def _ending(spec: JobSpec, state: State, reason: Reason, description: str | None = None) -> Ending:
    return Ending(spec.job_id, spec.attempt, state, reason, description)
