"""The long tier: every kind of fault again and again, at instants that a seed chooses, under clients that never stop.

`just chaos [--minutes N] [--seed S] [--record FILE]`. It ends by itself, with the table; the exit code is 1 unless
everything in it is 0. `just chaos --break NAME` puts a defect in place and plays the scenario that finds it.
"""

import argparse
import asyncio
import os
import platform
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random, randrange
from time import monotonic
from typing import Any

from core import __version__
from tests.faults.broken import DEFECTS
from tests.faults.cluster import cluster
from tests.faults.faults import KINDS, Kind, no_disk_can_be_mounted
from tests.faults.load import loading
from tests.faults.record import Record, read
from tests.faults.run import Run, running
from tests.faults.scenarios import played
from tests.faults.table import rendered, total
from tests.faults.verdicts import judge

NODES = {"n1": 8, "n2": 6, "n3": 4}
SMALL = "n3"
"""The node with a small disk."""
MINUTES = 5
CLIENTS = 26
RESTARTS = (0.0, 1.0)
SAID_SECONDS = 60
THROUGH_SECONDS = 180
"""Longer than any fault lasts."""
MOST_SAID = 20
CHAOS = Path(".chaos")


async def broken_on_purpose(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, list[str]]:
    """Play the scenario that finds a defect; what is broken, by column."""
    defect = DEFECTS[options.broken]
    say(f"{options.broken}: {defect.what}; played: {defect.scenario}")
    broken = await played(defect.scenario, folder, options.broken)
    _end(record, broken)
    return broken


async def chaos(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, list[str]]:
    """Run for so many minutes; what is broken, by column."""
    seed = options.seed
    small = () if no_disk_can_be_mounted() else (SMALL,)
    async with cluster(folder, nodes=NODES, broken=options.broken, small=small) as found:
        found.luck, found.restarts = Random(f"{seed} restarts"), RESTARTS
        async with (
            loading(found, Random(f"{seed} load"), clients=CLIENTS) as load,
            running(found, load, record, Random(f"{seed} looks")) as run,
        ):
            possible = [kind for kind in KINDS.values() if kind.impossible() is None and wanted(kind, options.only)]
            over = asyncio.Event()
            faults = [asyncio.create_task(_again_and_again(run, kind, seed, over)) for kind in possible]
            await _wait((options.minutes or MINUTES) * 60, run, faults)
            over.set()
            await _see_through(faults)
            await found.mend()
            await load.stop()
            calm = await run.settled()
            await found.ready()
            evidence = await run.evidence()
        broken = judge(evidence)
        if not calm:
            broken["lost"].append("something is not over after all")
    _end(record, broken, jobs=len({line.attempt.job_id for line in evidence.lines}), submitted=len(evidence.sent))
    return broken


def _end(record: Record, broken: dict[str, list[str]], jobs: int = 0, submitted: int = 0) -> None:
    record.footer(
        jobs=jobs,
        submitted=submitted,
        broken={column: len(texts) for column, texts in broken.items()},
        texts={column: texts[:MOST_SAID] for column, texts in broken.items()},
    )


def wanted(kind: Kind, only: list[str] | None) -> bool:
    """Whether it is among those that were asked for."""
    return only is None or any(text in kind.name for text in only)


async def _again_and_again(run: Run, kind: Kind, seed: int, over: asyncio.Event) -> None:
    luck = Random(f"{seed} {kind.name}")
    while not await _is_set_within(luck.expovariate(1 / kind.every), over):
        with suppress(ProcessLookupError):  # it ended by itself an instant before
            if struck := await kind.strike(run):
                run.record.fault(struck)


async def _is_set_within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def _wait(seconds: float, run: Run, faults: list[asyncio.Task[None]]) -> None:
    """Let it happen, and say now and then what has. A fault of the faults' own ends it."""
    end = monotonic() + seconds
    while (left := end - monotonic()) > 0:
        done, _ = await asyncio.wait(faults, timeout=min(left, SAID_SECONDS), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        say(f"{len(run.record.struck)} faults, {len(run.load.sent)} jobs, {run.record.looks} looks; {left:.0f} s to go")


async def _see_through(faults: list[asyncio.Task[None]]) -> None:
    """Let those under way come to their end: one that is replacing a worker would leave a node without any."""
    async with asyncio.timeout(THROUGH_SECONDS):
        await asyncio.gather(*faults)


def say(text: str) -> None:
    """A line for whoever looks on."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="just chaos", description="Faults at random, for some minutes.")
    parser.add_argument("--minutes", type=float, metavar="N", help=f"default: {MINUTES}")
    parser.add_argument("--seed", type=int, default=randrange(10**6), metavar="S")
    parser.add_argument("--record", type=Path, metavar="FILE", help=f"default: one below {CHAOS}")
    parser.add_argument(
        "--break",
        dest="broken",
        choices=DEFECTS,
        metavar="NAME",
        help=f"put one defect in place, to see it found: {', '.join(DEFECTS)}; at random instants if --minutes is said",
    )
    parser.add_argument("--only", action="append", metavar="TEXT", help="only kinds with this in their name; several")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder for everything, which is not removed")
    return parser.parse_args()


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What a record's header says."""
    return {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": f"just chaos --minutes {options.minutes or MINUTES:g} --seed {options.seed}"
        + (f" --break {options.broken}" if options.broken else "")
        + "".join(f" --only '{text}'" for text in options.only or ()),
        "seed": options.seed,
        "version": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "impossible": {kind.name: why for kind in KINDS.values() if (why := kind.impossible())},
    }


def main() -> int:
    """Run it; the exit code."""
    options = arguments()
    path = options.record or CHAOS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{options.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="rowlock-chaos-"))
    say(f"seed {options.seed}; the record is {path}")
    try:
        with path.open("w", encoding="ascii") as file:
            record = Record(file)
            record.header(**facts(options))
            run = broken_on_purpose if options.broken and options.minutes is None else chaos
            broken = asyncio.run(_until_told(run(options, folder, record)))
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(rendered(total([read(path)]))))
    for column, texts in broken.items():
        for text in texts[:MOST_SAID]:
            print(f"{column}: {text}")
    print(f"\nseed {options.seed}; {path}")
    return 1 if any(broken.values()) else 0


async def _until_told(run: Any) -> Any:
    """Ctrl-C and SIGTERM end it in order: nothing stays behind."""
    task = asyncio.ensure_future(run)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main())
