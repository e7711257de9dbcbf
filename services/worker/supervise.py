"""The run of one attempt, as a pipeline: prepare, start, wait, end, report, clean up."""

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from core.batch import Batcher
from core.db.connection import CONNECTION_ERRORS
from core.paths import JobPaths
from core.records import Ending, JobSpec
from core.states import Reason, State
from services.worker import files, health, proc, process
from services.worker.environment import MARK
from services.worker.launch import command_and_environment, paths_of
from services.worker.node import FIRST_TROUBLE_SECONDS, Node, Run
from services.worker.spool import Exit

Report = Batcher[Ending, bool]

# A disk or a table of processes that is full: not the job's fault, and over some time.
NODE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


async def supervise(node: Node, run: Run, report: Report) -> None:
    """Run one attempt to its end; it stays in `node.runs` until the commit that ends it.

    Cancelled, it leaves everything as it is: the script runs on, and the next worker finds it.
    """
    spec = run.spec
    log = structlog.get_logger().bind(job_id=spec.job_id, attempt=spec.attempt, node=node.name)
    if run.script is None and run.lost is None:
        log.info("job_started", name=spec.name, account=spec.account, cpus=spec.cpus)
    ending = await attempt(node, run)
    run.over = True
    if not ending.ran:
        with suppress(*CONNECTION_ERRORS):
            await health.look_once(node)  # first: or the job would be placed here again at once
    ended = not run.fenced and await report.do(ending)
    if run.script is not None:
        run.script.forget()
    with suppress(OSError):  # a disk that takes no changes; the next worker tries again
        files.remove_script(node.settings.scripts_dir, spec.job_id, spec.attempt)
    node.end(run)
    if not ended:
        log.warning("job_end_refused", state=ending.state)
        return
    log.info("job_ended", state=ending.state, reason=ending.reason, exit_code=ending.exit_code, signal=ending.signal)
    log.info("job_released", cpus=spec.cpus)


async def attempt(node: Node, run: Run) -> Ending:
    """Prepare, start, wait and end; nothing of the job is left when this returns."""
    if run.lost is not None:
        return _gone(node, run, f"it may have run, and nobody can tell how it ended: {run.lost}")
    if run.script is None:
        try:
            run.script = await _start(node, run.spec)
            node.trouble_seconds = FIRST_TROUBLE_SECONDS
        except (process.LaunchShortage, OSError) as error:
            return _not_started(node, run, error)
        except (files.FileRefused, process.LaunchFailed, ValueError) as error:
            return _ending(run.spec, State.FAILED, Reason.JOB_LAUNCH_FAILURE, description=str(error))
    verdict = await _wait(node, run, run.script)
    if verdict is not None:
        await process.end(run.script, node.settings.kill_grace_seconds)
    await process.sweep(run.script)
    try:
        exit_ = await run.script.wait()
    except process.ExitLost as error:
        return _gone(node, run, str(error))
    return replace(verdict or _verdict_of_exit(run.spec, exit_), exit_code=exit_.exit_code, signal=exit_.signal)


def _not_started(node: Node, run: Run, error: OSError | process.LaunchShortage) -> Ending:
    """The job goes back when the node is at fault, which then takes no more until it has what it lacks."""
    if isinstance(error, OSError) and error.errno not in NODE_ERRORS:
        return _ending(run.spec, State.FAILED, Reason.JOB_LAUNCH_FAILURE, description=str(error))
    problem = f"a job could not be started: {error}"
    health.found(node, problem)
    ending = _ending(run.spec, State.PENDING, Reason.RESOURCES, description=problem)
    return replace(ending, ran=False)


def _gone(node: Node, run: Run, why: str) -> Ending:
    """An attempt that ended with its node, or its worker: again, where that was granted."""
    if run.spec.requeue and not run.cancelled.is_set():
        return _ending(run.spec, State.PENDING, Reason.NONE, description=f"requeued: {why}")
    return _ending(run.spec, State.NODE_FAIL, Reason.SYSTEM_FAILURE, description=why)


async def _start(node: Node, spec: JobSpec) -> process.Process:
    paths = paths_of(node.settings, node.host, spec)
    roots = node.settings.roots
    with (
        _directory(roots, paths) as directory,
        _outputs(roots, paths, append=spec.restart_cnt > 0) as (stdout, stderr),
    ):
        # Last: from here to the start lies what a worker that is killed cannot tell from a script that ran.
        script = files.write_script(node.settings.scripts_dir, spec.job_id, spec.attempt, spec.script)
        command, environment = command_and_environment(node.host, spec, paths, script)
        return await process.start(
            command,
            env=environment,
            cwd=directory,
            stdout_fd=stdout,
            stderr_fd=stderr,
            tag=proc.tag_of(spec.job_id, spec.attempt, node.host.spool_id),
            mark=environment[MARK],
        )


@contextmanager
def _directory(roots: tuple[Path, ...], paths: JobPaths) -> Iterator[int]:
    descriptor = files.open_directory(roots, Path(paths.working_directory))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _outputs(roots: tuple[Path, ...], paths: JobPaths, *, append: bool) -> Iterator[tuple[int, int]]:
    """The open output files; they are the child's own once it has started."""
    stdout = files.open_output(roots, Path(paths.standard_output), append=append)
    try:
        if paths.standard_error == paths.standard_output:
            yield stdout, stdout
            return
        stderr = files.open_output(roots, Path(paths.standard_error), append=append)
        try:
            yield stdout, stderr
        finally:
            os.close(stderr)
    finally:
        os.close(stdout)


async def _wait(node: Node, run: Run, script: process.Script) -> Ending | None:
    """Wait for the script's own end (None), its time limit, its cancel, or the worker's stop: the verdict on it."""
    limit = run.spec.time_limit_seconds
    waits = [asyncio.ensure_future(wait) for wait in (script.wait(), run.cancelled.wait(), run.stopped.wait())]
    exited, cancelled, stopped = waits
    try:
        done, _ = await asyncio.wait(
            waits,
            timeout=None if limit is None else max(0.0, limit - run.started),
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        for future in waits:
            future.cancel()
        with suppress(process.ExitLost):
            await asyncio.gather(*waits, return_exceptions=True)
    if exited in done:
        return None
    if cancelled in done:
        return _ending(run.spec, State.CANCELLED, Reason.NONE)
    if stopped in done:
        return _gone(node, run, f"the worker of node {node.name} was stopped")
    return _ending(run.spec, State.TIMEOUT, Reason.TIME_LIMIT)


def _verdict_of_exit(spec: JobSpec, exit_: Exit) -> Ending:
    if exit_.signal is not None:
        return _ending(spec, State.FAILED, Reason.RAISED_SIGNAL)
    if exit_.exit_code:
        return _ending(spec, State.FAILED, Reason.NON_ZERO_EXIT_CODE)
    return _ending(spec, State.COMPLETED, Reason.NONE)


def _ending(spec: JobSpec, state: State, reason: Reason, description: str | None = None) -> Ending:
    return Ending(spec.job_id, spec.attempt, state, reason, description)
