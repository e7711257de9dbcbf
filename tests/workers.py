"""A node as its worker knows it, on the real tables and without a process."""

from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.db import jobs
from core.db.connection import Pool
from core.records import Attempt
from core.settings import Settings
from services.worker import proc
from services.worker.files import Scripts
from services.worker.launch import describe_host
from services.worker.node import Node, Run
from services.worker.spool import Spool
from tests.builders import a_job, a_node, give, register, start, submit


async def joined(settings: Settings, pool: Pool, tmp_path: Path, connection: asyncpg.Connection) -> Node:
    """A node as its worker knows it, registered and with a spool of its own."""
    spool = Spool(tmp_path / "scripts")
    identity = spool.open()
    granting = settings.model_copy(update={"requeue_after": 60.0})
    incarnation = await register(connection, a_node(spool_id=identity))
    host, scripts = describe_host(granting, identity), Scripts(spool.script_dir)
    found = Node(granting, pool, pool, host, spool, scripts, incarnation, proc.now(), granting.roots, 1)  # type: ignore[arg-type]
    found.hear(found.heard)
    found.recovered, found.trouble = True, None
    return found


async def started(connection: asyncpg.Connection, node: str = "n1", **changes: Any) -> Attempt:
    """A job that runs on a node."""
    [job_id] = await submit(connection, a_job(**changes))
    attempt = await give(connection, job_id, node)
    assert len(await start(connection, attempt, node=node)) == 1
    return attempt


async def a_run(node: Node, connection: asyncpg.Connection, **changes: Any) -> Run:
    """What the node runs, without a process."""
    attempt = await started(connection, **changes)
    [spec] = await jobs.running(connection, [attempt], node=node.name, incarnation=node.incarnation)
    run = node.runs[attempt] = Run(spec)
    return run


def nothing(run: Run) -> None:
    """What a report is given to begin runs with, where none can begin."""
    pytest.fail(f"{run} began")
