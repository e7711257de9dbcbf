"""Health: a node that lacks something drains itself and says why; one that hears nothing gives back what it may."""

import asyncio
import os
from contextlib import suppress

import structlog

from core.db import nodes
from services.worker import proc
from services.worker.node import Node

PROBE_BYTES = 256 * 1024
LONGEST_TROUBLE_SECONDS = 60.0


def found(node: Node, problem: str) -> None:
    """Something that every job needs was not to be had: the node is in trouble, each time for twice as long."""
    node.trouble = problem
    node.trouble_until = asyncio.get_running_loop().time() + node.trouble_seconds
    node.trouble_seconds = min(node.trouble_seconds * 2, LONGEST_TROUBLE_SECONDS)


async def look_once(node: Node) -> int:
    """Drain the node while it has a trouble; resume it once its time is over and a probe finds nothing."""
    if node.trouble is None:
        return 0
    problem = _probe(node)
    if problem is None and asyncio.get_running_loop().time() < node.trouble_until:
        problem = node.trouble
    async with node.pool.acquire() as connection:
        if problem is None:
            if await nodes.resume_itself(connection, node.name, node.incarnation):
                structlog.get_logger().info("node_resumes_itself", node=node.name)
        elif await nodes.drain_itself(connection, node.name, node.incarnation, problem):
            structlog.get_logger().warning("node_drains_itself", node=node.name, reason=problem)
    node.trouble = problem
    return 0


def _probe(node: Node) -> str | None:
    """What is wrong with the places that a job needs, in words; None when a file of some size can be written."""
    for folder in (node.settings.scripts_dir, node.settings.work_base_dir):
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            return f"{folder}: {error.strerror}"
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
    return None


async def end_after_silence_once(node: Node) -> int:
    """End jobs whose requeue was granted once PostgreSQL has been silent for REQUEUE_AFTER: by then others may go on.

    By a clock that nobody sets, counted from the last heartbeat that was answered, as the database counts from when
    it wrote that, which is later (core/loss.py). Jobs without a granted requeue run on.
    """
    if proc.now() - node.heard < node.settings.requeue_after:
        return 0
    for run in node.runs.values():
        if run.spec.requeue and not run.over and not run.stopped:
            structlog.get_logger().warning("job_ended_in_silence", job_id=run.spec.job_id, attempt=run.spec.attempt)
            run.stop()
    return 0
