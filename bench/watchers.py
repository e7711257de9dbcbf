"""`python -m bench.watchers`: the burst with many who look on (bench/crowd.py), in turns with one without them."""

import asyncio
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine, scale, stack
from bench.__main__ import CPUS, SLOWEST_PER_SECOND, count, note
from bench.apart import BenchError, measure
from bench.report import PERCENTS, cpu_microseconds
from bench.scale import CONNECTIONS

WITH, WITHOUT = "watched", "alone"


def measure_all(folder: Path, options: Namespace) -> dict[str, Any]:
    """Runs with and without, in turns."""
    results: dict[str, Any] = {WITHOUT: [], WITH: []}
    for number in range(options.runs):
        for kind in (WITHOUT, WITH) if number % 2 == 0 else (WITH, WITHOUT):
            polls, readers = (options.polls, options.readers) if kind == WITH else (0, 0)
            load = machine.load()
            with stack.running(folder, CPUS) as running:
                results["durability"] = asyncio.run(stack.durability(running.database_url))
                found = _one(running, options.jobs, polls, readers)
            results[kind].append({"load": load, "found": found})
            note(f"{kind}: finished/s {found['burst']['finished_per_second']} (load {load:.2f})")
    return results


def _one(running: stack.Stack, jobs: int, polls: int, readers: int) -> dict[str, Any]:
    seconds = 60 + jobs / SLOWEST_PER_SECOND
    place = ("--port", running.port, "--pid", running.pid, "--database", running.database_url)
    size = ("--jobs", jobs, "--connections", CONNECTIONS, "--seconds", seconds)
    found: dict[str, Any] = measure(
        "bench.crowd", *place, *size, "--polls", polls, "--readers", readers, seconds=seconds + 300
    )
    if polls and not found["followed"]:
        raise BenchError("the run is void: nobody saw a job end")
    return found


def lines(results: Mapping[str, Any]) -> list[str]:
    """The table. The issue names no target here."""
    rows: list[tuple[str, Callable[[Any], float]]] = [
        ("accepted/s", lambda f: f["burst"]["accepted_per_second"]),
        ("finished/s", lambda f: f["burst"]["finished_per_second"]),
        ("MiB of the API before", lambda f: f["memory_kib"]["before"]["api"] / 1024),
        ("MiB of the API while they wait", lambda f: f["memory_kib"]["waiting"]["api"] / 1024),
        ("MiB of the API after the burst", lambda f: f["memory_kib"]["after"]["api"] / 1024),
        ("ends that were waited for and answered", lambda f: f["followed"]),
        *((f"from the end to its answer, p{part}, ms", _late(str(part))) for part in PERCENTS),
        ("answers to log readers", lambda f: sum(f["reads"].values())),
        ("CPU seconds of those who look on", lambda f: f["crowd_cpu_seconds"]),
    ]
    arguments = results["arguments"]
    title = f"{arguments['jobs']} jobs; {arguments['polls']} long polls, {arguments['readers']} log readers"
    table = [f"{title:<52}{WITHOUT:>13}{WITH:>13}"]
    for name, value in rows:
        cells = (statistics.median(value(run["found"]) for run in results[kind]) for kind in (WITHOUT, WITH))
        table.append(f"  {name:<50}" + "".join(f"{cell:>13,.1f}" for cell in cells))
    costs = [cpu_microseconds([{"found": run["found"]["burst"]} for run in results[kind]]) for kind in (WITHOUT, WITH)]
    table += ["", "CPU of a job of the burst, microseconds, by who used it"]
    table += [
        f"  {role:<50}" + "".join(f"{cost.get(role, 0.0):>13,.0f}" for cost in costs) for role in sorted(costs[1])
    ]
    part = finished(results)
    loads = ", ".join(f"{run['load']:.2f}" for kind in (WITHOUT, WITH) for run in results[kind])
    return [*table, "", f"finished/s with them, as part of that without: {part:.2f}", f"load before each: {loads}"]


def _late(percent: str) -> Callable[[Any], float]:
    return lambda found: float(found["late_ms"].get(percent, 0.0))


def finished(results: Mapping[str, Any]) -> float:
    """Of finished/s, what is left with watchers: the median over the pairs."""
    pairs: Sequence[tuple[Any, Any]] = list(zip(results[WITHOUT], results[WITH], strict=True))
    rates = [[float(run["found"]["burst"]["finished_per_second"]) for run in pair] for pair in pairs]
    return statistics.median(after / before for before, after in rates)


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was measured; 1 with one line when a run is void."""
    parser = scale.parser("watchers", __doc__)
    parser.add_argument("--polls", type=count, default=1000, metavar="N", help="long polls (%(default)s)")
    parser.add_argument("--readers", type=count, default=20, metavar="N", help="log readers (%(default)s)")
    parser.add_argument("--jobs", type=count, default=scale.JOBS, metavar="N", help="of the burst (%(default)s)")
    parser.add_argument("--runs", type=count, default=3, metavar="N", help="of each kind (%(default)s)")
    options = parser.parse_args(words)
    scale.allow_many_files()
    return scale.run("watchers", options, lambda folder: measure_all(folder, options), lines)


if __name__ == "__main__":
    sys.exit(main())
