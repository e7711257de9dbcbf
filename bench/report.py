"""From what was measured to what is printed: percentiles, medians, targets, a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_LINE_TARGET_MS = 12.0
FRACTION_TARGET = 0.25
PERCENTS = (50, 95, 99)
DEAR_FILE_MICROSECONDS = 100.0

LATENCIES = (
    ("first_line_ms", "submit -> first line of the script"),
    ("final_ms", "submit -> final state at the client"),
    ("first_line_while_waited_ms", "(first line, while it is waited for)"),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed (nearest rank): one that was measured."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


@dataclass(frozen=True, slots=True)
class Spread:
    """What several runs gave."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Target:
    """A promise, what came of it, and whether it was met; `met` is None when it was not measured."""

    text: str
    measured: str
    met: bool | None


def targets(results: Mapping[str, Any]) -> list[Target]:
    first_line = percentile(results["latency"]["first_line_ms"], 50) if results.get("latency") else None
    part = fraction(results) if results.get("bursts") else None
    return [
        Target(
            f"p50 of submit -> first line <= {FIRST_LINE_TARGET_MS:g} ms",
            "-" if first_line is None else f"{first_line:.1f} ms",
            None if first_line is None else first_line <= FIRST_LINE_TARGET_MS,
        ),
        Target(
            f"finished/s >= {FRACTION_TARGET:.0%} of the bare limit",
            "-" if part is None else f"{part:.1%}",
            None if part is None else part >= FRACTION_TARGET,
        ),
    ]


def fraction(results: Mapping[str, Any], kind: str = "bursts") -> float:
    """Finished jobs a second of the bare limit, median of median."""
    return _rates(results, "finished_per_second", kind).median / _limit(results).median


def _rates(results: Mapping[str, Any], name: str, kind: str = "bursts") -> Spread:
    return spread([run["found"][name] for run in results[kind]])


def _limit(results: Mapping[str, Any]) -> Spread:
    return spread([run["found"]["scripts_per_second"] for run in results["limits"]])


def render(results: Mapping[str, Any]) -> str:
    """The table."""
    lines = [*machine_lines(results)]
    if results.get("latency"):
        lines += ["", *_latency_lines(results["latency"], results["latency_load"])]
    if results.get("bursts"):
        lines += ["", *_burst_lines(results), "", *_cost_lines(results["bursts"])]
    return "\n".join([*lines, "", *target_lines(targets(results))])


def machine_lines(results: Mapping[str, Any]) -> list[str]:
    """What every table begins with."""
    durability = ", ".join(f"{name}={value}" for name, value in results["durability"].items())
    return [machine_line(results["machine"]), f"PostgreSQL {durability}", *_warning_lines(results["machine"])]


def _warning_lines(machine: Mapping[str, Any]) -> list[str]:
    if machine["file_microseconds"] <= DEAR_FILE_MICROSECONDS:
        return []
    return [
        "new files are dear here now, and a job makes three: many were deleted lately, perhaps by the last run;"
        " wait five minutes, or set TMPDIR to another disk (README.md)"
    ]


def machine_line(machine: Mapping[str, Any]) -> str:
    """The facts that a reader compares."""
    return (
        f"{machine['usable_cpus']} of {machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']},"
        f" Python {machine['python']}, {machine['filesystem']} ({machine['file_microseconds']:.0f} us a new file),"
        f" load {machine['load'][0]:.2f}"
    )


def _latency_lines(latency: Mapping[str, Any], load: float) -> list[str]:
    jobs = len(latency["first_line_ms"])
    title = f"idle, {jobs} jobs one after another (load {load:.2f})"
    lines = [f"{title:<52}" + "".join(f"{f'p{percent}':>11}" for percent in PERCENTS)]
    for name, text in LATENCIES:
        values = [percentile(latency[name], percent) for percent in PERCENTS]
        lines.append(f"  {text:<50}" + "".join(f"{value:>8.2f} ms" for value in values))
    for text, values in latency["steps_ms"].items():
        lines.append(f"    {text:<48}" + "".join(f"{percentile(values, percent):>8.2f} ms" for percent in PERCENTS))
    return lines


def _burst_lines(results: Mapping[str, Any]) -> list[str]:
    arguments, bursts = results["arguments"], results["bursts"]
    title = f"burst, {arguments['jobs']} jobs, {arguments['connections']} connections, {len(bursts)} runs"
    rows = [
        ("accepted/s", _rates(results, "accepted_per_second")),
        ("finished/s", _rates(results, "finished_per_second")),
        ("as one list: accepted/s", _rates(results, "accepted_per_second", "lists")),
        ("as one list: finished/s", _rates(results, "finished_per_second", "lists")),
        ("bare limit, scripts/s", _limit(results)),
    ]
    lines = [f"{title:<52}{'median':>11}{'min':>11}{'max':>11}"]
    lines += [f"  {text:<50}{row.median:>11.1f}{row.min:>11.1f}{row.max:>11.1f}" for text, row in rows]
    lines.append(f"  {'finished/s of the bare limit':<50}{fraction(results):>11.1%}")
    lines.append(f"  {'as one list: finished/s of the bare limit':<50}{fraction(results, 'lists'):>11.1%}")
    loads = ", ".join(f"{run['load']:.2f}" for run in bursts)
    return [*lines, f"  load before each burst: {loads}"]


def _cost_lines(bursts: Sequence[Mapping[str, Any]]) -> list[str]:
    costs = cpu_microseconds(bursts)
    written = spread([run["found"]["transactions"] / run["found"]["jobs"] for run in bursts])
    wal = spread([run["found"]["wal_bytes"] / run["found"]["jobs"] for run in bursts])
    return [
        "CPU of a job of the burst, microseconds, by who used it",
        *(f"  {role:<50}{cost:>11.0f}" for role, cost in sorted(costs.items(), key=lambda item: -item[1])),
        f"a job of the burst: {written.median:.2f} writing transactions, {wal.median / 1024:.1f} KiB of WAL",
    ]


def cpu_microseconds(bursts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CPU per job by role, median of the runs."""
    roles = {role for run in bursts for role in run["found"]["cpu_seconds"]}
    return {
        role: statistics.median(
            run["found"]["cpu_seconds"].get(role, 0.0) / run["found"]["jobs"] * 1e6 for run in bursts
        )
        for role in roles
    }


def target_lines(found: Sequence[Target]) -> list[str]:
    """A line each, with whether it was met."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return [f"target: {target.text:<44}{target.measured:>11}   {words[target.met]}" for target in found]
