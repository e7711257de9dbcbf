"""Slurm's driver. `--variant defaults` is slurm.conf beside this file; `--variant tuned` adds tuned.conf.

Accepted: `sbatch` has ended with a job's number, so slurmctld has it (it writes its state every few seconds). 16 of
them at once hand in the burst; of `list`, one makes an array. First line: of the script, by its own stamp. Final state:
`scontrol show job` says COMPLETED, asked 20 times a second. A job of the burst was over by slurmctld's log.

The driver needs nothing but the standard library; slurmd has to be started by root.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from string import Template

from bench.apart import BenchError
from bench.peers.drive import START_SECONDS, Client, Orders, Worker, main

HERE = Path(__file__).parent
THREADS = {"defaults": "2", "tuned": "10"}  # of munged: its default, and what the guide says
POLL_SECONDS = 0.05  # each look is a process
_OVER = re.compile(r"^\[(\S+)\] _job_complete: JobId=([0-9_]+)\S* done", re.MULTILINE)
_STATE = re.compile(r"JobState=(\S+)")


class _Client(Client):
    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._log = orders.folder / "slurmctld.log"

    async def submit(self, number: int) -> str:
        return await _told("sbatch", "--parsable", "--output", self._orders.output(number), self._orders.script)

    async def submit_list(self, numbers: Sequence[int]) -> list[str]:
        array = ("--array", f"{numbers[0]}-{numbers[-1]}", "--output", str(self._orders.folder / "outputs" / "%a"))
        job_id = await _told("sbatch", "--parsable", *array, self._orders.script)
        return [f"{job_id}_{number}" for number in numbers]

    async def wait(self, job: str, poll: float, seconds: float) -> float:
        deadline = time.monotonic() + seconds
        look = self._seen if self._orders.workload == "idle" else self._logged
        while (over := await look(job)) is None:
            if time.monotonic() > deadline:
                raise BenchError(f"job {job} is not over after {seconds:g} s")
            await asyncio.sleep(POLL_SECONDS)
        return over

    async def _seen(self, job: str) -> float | None:
        state = _STATE.search(await _told("scontrol", "--oneliner", "show", "job", job))
        assert state is not None
        if state[1] in ("PENDING", "RUNNING", "COMPLETING"):
            return None
        if state[1] != "COMPLETED":
            raise BenchError(f"job {job} ended {state[1]}")
        return time.time()

    async def _logged(self, job: str) -> float | None:
        over = {job_id: when for when, job_id in _OVER.findall(self._log.read_text())}
        return datetime.fromisoformat(over[job]).timestamp() if job in over else None


async def _told(*words: str) -> str:
    """What a command of Slurm's says. Raises BenchError."""
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = (await process.communicate())[0].decode().strip()
    if process.returncode != 0:
        raise BenchError(f"{words[0]} ended with {process.returncode}: {said}")
    return said


@asynccontextmanager
async def client(orders: Orders) -> AsyncIterator[Client]:
    async with asyncio.timeout(START_SECONDS):
        while await _told("sinfo", "--noheader", "--format", "%T") != "idle":  # noqa: ASYNC110  (Slurm tells nobody)
            await asyncio.sleep(POLL_SECONDS)
    yield _Client(orders)


def workers(orders: Orders) -> list[Worker]:
    """munged first: the others ask it who they are."""
    folder = orders.folder
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    conf.write_text(_configuration(orders))
    os.environ["SLURM_CONF"] = str(conf)
    files = (
        "--socket",
        folder / "munge.sock",
        "--pid-file",
        folder / "munge.pid",
        "--seed-file",
        folder / "munge.seed",
    )
    munged = ("munged", "--foreground", "--force", "--num-threads", THREADS[orders.variant], "--key-file", key, *files)
    return [
        Worker(_found(*munged), ready="work thread"),
        Worker(_found("slurmctld", "-D", "-f", conf), ready="Running as primary controller"),
        Worker(_found("slurmd", "-D", "-f", conf), ready=""),  # tuned, it says nothing; sinfo does
    ]


def _found(name: str, *words: str | Path) -> list[str]:
    """A command line for execv, which looks for nothing."""
    path = shutil.which(name)
    assert path is not None  # the harness has looked
    return [path, *map(str, words)]


def _configuration(orders: Orders) -> str:
    texts = [
        (HERE / name).read_text() for name in ("slurm.conf", *(["tuned.conf"] if orders.variant == "tuned" else []))
    ]
    slurmctld_port, slurmd_port = _free_ports(2)
    return Template("".join(texts)).substitute(
        folder=orders.folder, cpus=orders.cpus, slurmctld_port=slurmctld_port, slurmd_port=slurmd_port
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    sys.exit(main(client, workers))
