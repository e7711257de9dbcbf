"""Who is measured, how one of them is, and why one cannot be here.

Each measurement has a fresh directory, its own servers in it, and processes of its own that end with it.
"""

import asyncio
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import latency, spawn, stack
from bench.apart import BenchError, measure
from bench.peers.install import ENVIRONMENT, installed
from core.errors import RowlockError
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis

CPUS = 8
CONNECTIONS = 16
WORKLOADS = ("idle", "burst", "list")
"""One job after another; many single submissions; as many in one request."""
LIMIT = "bare limit"
ROWLOCK = "Rowlock"
SLURM_COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch")
SERVERS = {"redis": EmbeddedRedis, "postgres": EmbeddedPostgres}
START_SECONDS, JOB_SECONDS, SLOWEST_PER_SECOND = 180.0, 10.0, 10.0  # slower than that is given up
LOG_LINES = 3

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What to measure: how many jobs, and for `idle` the seconds between two."""

    workload: str
    jobs: int
    pause: float

    @property
    def seconds(self) -> float:
        """When to give it up."""
        each = JOB_SECONDS + self.pause if self.workload == "idle" else 1 / SLOWEST_PER_SECOND
        return START_SECONDS + each * self.jobs


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the tables."""

    name: str
    workloads: tuple[str, ...]
    run: Callable[[Path, Task], Found]
    """Measure somewhere in a directory. Raises BenchError, also with what it lacks here and how to get it."""
    slow: bool = False
    """Whether it gets fewer jobs."""


def contenders() -> list[Contender]:
    return [
        Contender(LIMIT, ("burst", "list"), _limit),
        Contender(ROWLOCK, WORKLOADS, _rowlock),
        _peer("HyperQueue", "hyperqueue", workloads=WORKLOADS),
        _peer("arq", "arq", server="redis"),
        _peer("RQ, no fork", "rq", server="redis", variant="simple", workloads=WORKLOADS),
        _peer("RQ, forking", "rq", server="redis", variant="fork", workloads=WORKLOADS),
        _peer("Celery, processes", "celery", server="redis", variant="prefork"),
        _peer("Celery, threads", "celery", server="redis", variant="threads"),
        _peer("Dramatiq", "dramatiq", server="redis"),
        _peer("procrastinate", "procrastinate", server="postgres", workloads=WORKLOADS),
        _slurm("Slurm, defaults", "defaults"),
        _slurm("Slurm, tuned", "tuned"),
    ]


def _peer(
    name: str, package: str, *, server: str = "", variant: str = "", workloads: tuple[str, ...] = ("idle", "burst")
) -> Contender:
    """What PyPI has: its driver is called like the package, and runs in the peers' environment."""

    def run(workspace: Path, task: Task) -> Found:
        if not installed(package):
            raise BenchError(f"{package} is not installed: python -m bench.peers install")
        return _driven(workspace, package, variant, server, task)

    return Contender(name, workloads, run)


def _slurm(name: str, variant: str) -> Contender:
    def run(workspace: Path, task: Task) -> Found:
        if lacking := [command for command in SLURM_COMMANDS if shutil.which(command) is None]:
            raise BenchError(f"no {', '.join(lacking)} here: python -m bench.peers install --apt, as root on Debian")
        if os.geteuid() != 0:
            raise BenchError("slurmd has to be started by root")
        return _driven(workspace, "slurm", variant, "", task)

    return Contender(name, WORKLOADS, run, slow=True)


def _limit(_: Path, task: Task) -> Found:
    found = measure("bench.spawn", "--jobs", task.jobs, "--at-once", CPUS, seconds=task.seconds)
    return {"finished_per_second": found["scripts_per_second"]}


def _rowlock(workspace: Path, task: Task) -> Found:
    with stack.running(workspace, CPUS) as running:
        words: tuple[object, ...] = ("--port", running.port, "--jobs", task.jobs)
        if task.workload == "idle":
            found = measure("bench.latency", *words, "--pause", task.pause, seconds=task.seconds)
            # Of the jobs that are waited for, as those of the peers all are.
            return {"first_line_ms": found["first_line_while_waited_ms"], "final_ms": found["final_ms"]}
        words += ("--pid", running.pid, "--database", running.database_url, "--connections", CONNECTIONS)
        words += ("--seconds", task.seconds, *(["--list"] if task.workload == "list" else []))
        found = measure("bench.burst", *words, seconds=task.seconds + 30)
        return {name: found[name] for name in ("jobs", "accepted_per_second", "finished_per_second")}


def _driven(workspace: Path, module: str, variant: str, server: str, task: Task) -> Found:
    folder = Path(tempfile.mkdtemp(prefix=f"{module}-", dir=workspace))
    _lay_out(folder, task.workload)
    words = ("--workload", task.workload, "--jobs", task.jobs, "--pause", task.pause)
    try:
        with _serving(server, folder / "server") as url:
            found: Found = measure(
                f"bench.peers.{module}",
                *(*words, "--cpus", CPUS, "--folder", folder, "--variant", variant),
                seconds=task.seconds,
                python=sys.executable if module == "slurm" else str(ENVIRONMENT / "bin" / "python"),
                env={"BENCH_SERVER": url},
            )
    except (BenchError, RowlockError) as error:
        raise BenchError(f"{error}{_last_words(folder)}") from None
    return found


def _lay_out(folder: Path, workload: str) -> None:
    """What a driver finds: the very scripts that Rowlock and the bare limit run."""
    script = folder / "script"
    script.write_text(latency.SCRIPT if workload == "idle" else spawn.SCRIPT)
    script.chmod(stat.S_IRWXU)
    (folder / "outputs").mkdir()


@contextmanager
def _serving(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a fresh server; none for who needs none."""
    if not kind:
        yield ""
        return
    server = SERVERS[kind](folder)
    try:
        asyncio.run(server.start())
        yield server.url
    finally:
        asyncio.run(server.stop())


def _last_words(folder: Path) -> str:
    """The ends of the logs that its processes left, newest last, in one line."""
    lines: list[str] = []
    for log in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime):
        with suppress(OSError):
            lines += log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "".join(f" | {line.strip()}" for line in lines[-LOG_LINES:])
