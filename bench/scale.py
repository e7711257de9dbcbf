"""What the workloads of scale have in common: how a run begins and ends, points that are compared, their table."""

import argparse
import asyncio
import resource
import signal
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine, report, stack
from bench.__main__ import CPUS, RESULTS, count, note, save, stop
from bench.apart import BenchError, measure
from bench.report import Target

LEAST_RATE = 0.8
MOST_BUFFERS = 1.5
MOST_MEMORY = 1.2
WATCHED_ROLES = ("api", "scheduler", "worker")
JOBS = 2000
CONNECTIONS = 16
SLOWEST_ROWS_PER_SECOND = 2000
"""Slower tables are given up."""


def run(
    name: str, options: Namespace, work: Callable[[Path], dict[str, Any]], lines: Callable[[Any], list[str]]
) -> int:
    """Measure in a workspace, write the results, print the table: the exit code, as that of `python -m bench`."""
    signal.signal(signal.SIGTERM, stop)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    given = {key: value for key, value in vars(options).items() if key != "json"}
    results: dict[str, Any] = {"workload": name, "time": now, "arguments": given}
    try:
        with stack.workspace() as folder:
            results["machine"] = asdict(machine.facts(folder))
            note(report.machine_line(results["machine"]))
            results |= work(folder)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    path = save(results, options.json or RESULTS / f"{name}-{now.replace(':', '')}.json")
    print("\n".join([*report.machine_lines(results), "", *lines(results)]))
    print(f"results: {path}")
    return 0


def allow_many_files() -> None:
    """In this process and in those that it starts: a connection is a file, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parser(name: str, what: str) -> argparse.ArgumentParser:
    """The arguments that every workload takes."""
    found = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=what)
    found.add_argument("--json", type=Path, metavar="FILE", help=f"the results (bench/results/{name}-TIME.json)")
    return found


def counts(text: str) -> list[int]:
    """Numbers from 0 on, with commas, as an argument; they are compared with the first."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError("should be different numbers from 0 on, such as 1000,100000")
    return numbers


def add_pairs(found: argparse.ArgumentParser) -> None:
    """The arguments of workloads that compare points."""
    found.add_argument("--pairs", type=count, default=5, metavar="N", help="of the first and the last point (5)")
    found.add_argument("--jobs", type=count, default=JOBS, metavar="N", help=f"submitted at each point ({JOBS})")


def schedule(points: Sequence[int], pairs: int) -> list[int]:
    """In which order the points are measured: all of them once, then the first and the last, in turns."""
    ends = [points[0], points[-1]] if len(points) > 1 else []
    return [*points, *(point for pair in range(1, pairs) for point in (ends if pair % 2 == 0 else ends[::-1]))]


@dataclass(frozen=True, slots=True)
class Point:
    """What is in the tables of one stack, and how it is called."""

    label: int
    waiting: int
    finished: int


def measure_points(folder: Path, points: Sequence[Point], jobs: int) -> dict[str, Any]:
    """Each in a stack of its own, in this order. Raises BenchError."""
    found: dict[str, Any] = {"points": []}
    for point in points:
        rows = point.waiting + 2 * point.finished
        seconds = 180 + rows / SLOWEST_ROWS_PER_SECOND + jobs / 10
        load = machine.load()
        with stack.running(folder, CPUS) as running:
            found["durability"] = asyncio.run(stack.durability(running.database_url))
            words = ("--port", running.port, "--pid", running.pid, "--database", running.database_url)
            size = ("--waiting", point.waiting, "--finished", point.finished, "--jobs", jobs)
            limits = ("--connections", CONNECTIONS, "--seconds", seconds)
            rates = measure("bench.rates", *words, *size, *limits, seconds=seconds + 30)
        found["points"].append({"label": point.label, "load": load, "found": rates})
        told = ", ".join(f"{name} {value:g}/s" for name, value in rates["rates"].items() if ":" not in name)
        note(f"{point.label:,}: {told} (filled in {rates['fill_seconds']:g} s, load {load:.2f})")
    return found


def ratio(points: Sequence[Mapping[str, Any]], kind: str, name: str) -> float | None:
    """The last point as part of the first: the median over the pairs, each of two runs one after the other."""
    low, high = points[0]["label"], max(point["label"] for point in points)
    parts = [
        after / before
        for before, after in zip(
            (value_of(point, kind, name) for point in points if point["label"] == low),
            (value_of(point, kind, name) for point in points if point["label"] == high),
            strict=False,
        )
        if before and after is not None
    ]
    return statistics.median(parts) if parts and high != low else None


def value_of(point: Mapping[str, Any], kind: str, name: str) -> float | None:
    """What one run found; None where that is not to be found out."""
    found: float | None = point["found"][kind].get(name)
    return found


def point_targets(points: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Those of issue 4: whoever is worst of each kind."""
    rates = {name: ratio(points, "rates", name) for name in _names(points, "rates")}
    pages = {name: ratio(points, "buffers", name) for name in _names(points, "buffers")}
    sizes = {name: ratio(points, "memory_kib", name) for name in WATCHED_ROLES}
    return [
        _target(f"each rate >= {LEAST_RATE:.0%} of the first", rates, min, lambda part: part >= LEAST_RATE),
        _target(f"buffers of each statement <= {MOST_BUFFERS:g} x", pages, max, lambda part: part <= MOST_BUFFERS),
        _target(f"memory of each role <= {MOST_MEMORY:g} x", sizes, max, lambda part: part <= MOST_MEMORY),
    ]


def _target(
    text: str,
    parts: Mapping[str, float | None],
    worst: Callable[..., float],
    met: Callable[[float], bool],
) -> Target:
    known = {name: part for name, part in parts.items() if part is not None}
    if not known:
        return Target(text, "-", None)
    part = worst(known.values())
    name = next(name for name, value in known.items() if value == part)
    return Target(text, f"{part:.2f} ({name})", met(part))


def _names(points: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point["found"][kind]))


KINDS = (
    ("rates", "a second, median", "{:,.1f}"),
    ("buffers", "buffers (8 KiB) that a statement touches, for 8 jobs where it takes several", "{:,.0f}"),
    ("memory_kib", "MiB of each role at most (PSS)", "{:,.1f}"),
)


def point_lines(results: Mapping[str, Any]) -> list[str]:
    """The table, and the targets."""
    points = results["points"]
    labels = list(dict.fromkeys(point["label"] for point in points))
    lines = []
    for kind, title, form in KINDS:
        heads = "".join(f"{label:>13,}" for label in labels)
        lines += [f"{title[:44]:<44}{heads}{'last/first':>13}"]
        for name in _names(points, kind):
            cells = "".join(f"{_cell(points, kind, name, label, form):>13}" for label in labels)
            part = ratio(points, kind, name)
            lines.append(f"  {name:<42}{cells}{'' if part is None else format(part, '.2f'):>13}")
        lines.append("")
    loads = ", ".join(f"{point['load']:.2f}" for point in points)
    return [*lines, f"load before each: {loads}", *report.target_lines(point_targets(points))]


def _cell(points: Sequence[Mapping[str, Any]], kind: str, name: str, label: int, form: str) -> str:
    values = [
        value for point in points if point["label"] == label and (value := value_of(point, kind, name)) is not None
    ]
    if not values:
        return "-"
    return form.format(statistics.median(values) / (1024 if kind == "memory_kib" else 1))
