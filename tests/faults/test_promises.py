"""What is promised of a worker that is killed, as a client sees it."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from core.documents import JobDocument
from core.settings import Settings
from tests.system import System, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.long]

COUNT = 50
WAITS = "#!/bin/bash\necho up\nwhile [ ! -e {go} ]; do sleep 0.1; done\necho down\n{end}\n"
ENDS = ("exit 0", "exit 137", "exit 255", "kill -9 $$", "kill -TERM $$")
SEEN = {
    "exit 0": ("COMPLETED", 0, None),
    "exit 137": ("FAILED", 137, None),
    "exit 255": ("FAILED", 255, None),
    "kill -9 $$": ("FAILED", None, "KILL"),
    "kill -TERM $$": ("FAILED", None, "TERM"),
}


async def documents(system: System) -> list[JobDocument]:
    """Every job as a client sees it."""
    return [job async for job in system.api.all_jobs(order="oldest")]


def registered(settings: Settings) -> int:
    """How often a worker has registered, as its log says."""
    return (settings.log_dir / "worker.log").read_text().count('"node_registered"')


async def test_kill_9_of_a_worker_with_50_jobs_three_times_in_a_row_changes_nothing_but_the_time(
    settings: Settings, tmp_path: Path
) -> None:
    quick = settings.model_copy(update={"heartbeat_seconds": 0.5, "lease_seconds": 30.0})
    go = tmp_path / "go"
    async with running(quick, tmp_path, workers={settings.node_name: COUNT}) as system:
        scripts = [WAITS.format(go=go, end=ENDS[number % len(ENDS)]) for number in range(COUNT)]
        submitted = await asyncio.gather(*(system.api.submit({"account": "a"}, script) for script in scripts))
        for job in submitted:
            await system.says(job["job_id"], b"up")
        before = await documents(system)
        assert {job["state"] for job in before} == {"RUNNING"}
        for _ in range(3):
            times = registered(settings)
            os.kill(system.worker_pid(), signal.SIGKILL)

            async def back(before: int = times) -> bool:
                return registered(settings) > before

            await until(back, "another worker registers")
            assert await documents(system) == before
        go.touch()
        for number, job in enumerate(submitted):
            ended = await system.api.wait(job["job_id"], timeout_seconds=60)
            assert (ended["state"], ended["exit_code"], ended["signal"]) == SEEN[ENDS[number % len(ENDS)]]
            assert (ended["attempt"], ended["restart_cnt"]) == (1, 0)
            assert await system.api.logs(job["job_id"]) == b"up\ndown\n"
        assert [node["alloc_cpus"] for node in await system.api.nodes()] == [0]
