"""Many workers in one process, each a node of its own, whose scripts end at once: `python -m bench.worker …`.

Real is everything (registration, heartbeats, the stream, starts, files, ends, the file server) but these two:

- `process.start`: nothing is started, and what it answers has ended with exit code 0;
- `proc.all_pids`: a node sees no processes but this one, as it would on a machine of its own. Else each of them
  reads, as it starts, what the kernel tells of thousands of database connections.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import SecretStr

from core import log
from core.settings import Settings
from services.worker import proc, process
from services.worker.loop import new_event_loop
from services.worker.serve import serve
from services.worker.spool import Exit

START_APART_SECONDS = 0.04
"""From the start of one worker to that of the next in a process."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A script (process.Script) that ended as it was started."""

    pid: int

    async def wait(self) -> Exit:
        """Exit code 0."""
        return Exit(0, None)

    def signal(self, number: int) -> None:
        """There is nobody to hear it."""

    def members(self) -> list[int]:
        """Nothing is left."""
        return []

    def kill_leftovers(self) -> bool:
        """Nothing is left."""
        return False

    def forget(self) -> None:
        """There is nothing to reap."""


async def end_at_once(command: Sequence[str], **_: Any) -> Ended:
    """Stands where `process.start` does."""
    return Ended(os.getpid())


def own_pid() -> Iterator[int]:
    """Stands where `proc.all_pids` does."""
    yield os.getpid()


def replace(module: ModuleType, name: str, value: object) -> None:
    """Let another stand where something does that is there."""
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def replace_what_is_not_real() -> None:
    """From now on in this process."""
    replace(process, "start", end_at_once)
    replace(proc, "all_pids", own_pid)


def settings_of(folder: Path, number: int, options: argparse.Namespace) -> Settings:
    """Those of one node: the defaults, whatever the environment says."""
    changed: dict[str, Any] = {
        "database_url": SecretStr(options.database),
        "redis_url": SecretStr(options.redis),
        "node_name": name_of(number),
        "total_cpus": options.cpus,
        "data_dir": folder / name_of(number),
        "poll_seconds": options.poll,
    }
    return Settings.model_construct().model_copy(update=changed)


def name_of(number: int) -> str:
    """A node's name."""
    return f"node-{number:04d}"


async def run(options: argparse.Namespace) -> None:
    """Run the workers until told to stop."""
    stop = asyncio.Event()
    for told in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(told, stop.set)
    async with asyncio.TaskGroup() as group:
        for number in range(options.first, options.first + options.nodes):
            group.create_task(serve(settings_of(options.folder, number, options), stop))
            await asyncio.sleep(START_APART_SECONDS)


def main() -> int:
    """The entry of `python -m bench.worker`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first", type=int, required=True, help="the number of the first node")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True, help="of each node")
    parser.add_argument("--poll", type=float, required=True, help="POLL_SECONDS of the nodes")
    parser.add_argument("--database", required=True)
    parser.add_argument("--redis", required=True)
    options = parser.parse_args()
    log.configure("worker", options.folder / f"logs-{options.first}", "INFO")
    replace_what_is_not_real()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
