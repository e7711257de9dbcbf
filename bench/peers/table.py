"""From what was measured to tables and charts: medians with min and max, and each rate as a part of the bare limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.peers.chart import Bar, bars
from bench.peers.contenders import LIMIT, WORKLOADS
from bench.report import Spread, machine_line, percentile, spread

TITLES = {
    "idle": "idle, {latency_jobs} jobs one after another, {pause:g} s apart",
    "burst": "burst, {jobs} single submissions",
    "list": "list, {jobs} in one request",
}
HEADS = {
    "idle": ("first line, p50 ms", "p99", "final state, p50 ms", "p99"),
    "burst": ("accepted/s", "finished/s", "of the limit"),
    "list": ("accepted/s", "finished/s", "of the limit"),
}
LATENCIES = ("first_line_ms", "final_ms")
PERCENTS = (50, 99)
WIDTH, CELL = 28, 30


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one workload: what each figure came to over the runs, or why there is none."""

    name: str
    jobs: int
    figures: Mapping[str, Spread]
    why_not: str = ""


def rows(results: Mapping[str, Any], workload: str) -> list[Row]:
    """In the order of the contenders. A single run that failed leaves no figure."""
    measured = [one for one in results["measurements"] if one["workload"] == workload]
    names = dict.fromkeys(one["name"] for one in measured)
    order = [name for name in results["contenders"] if name in names]
    return [_row(name, [one for one in measured if one["name"] == name]) for name in order]


def _row(name: str, measured: Sequence[Mapping[str, Any]]) -> Row:
    why = next((one["why_not"] for one in measured if "why_not" in one), "")
    if why:
        return Row(name, measured[0]["jobs"], {}, why)
    runs = [_figures(one["found"]) for one in measured]
    figures = {figure: spread([run[figure] for run in runs]) for figure in runs[0]}
    return Row(name, measured[0]["jobs"], figures)


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The single figures of one run: rates as they are, of latencies two percentiles each."""
    figures: dict[str, float] = {}
    for name, value in found.items():
        if name.endswith("_ms"):
            figures |= {f"{name} p{percent}": percentile(value, percent) for percent in PERCENTS}
        elif name.endswith("_per_second"):
            figures[name] = value
    return figures


def render(results: Mapping[str, Any]) -> str:
    """All tables."""
    lines = [machine_line(results["machine"])]
    for workload in WORKLOADS:
        if found := rows(results, workload):
            lines += ["", *_table(workload, found, results["arguments"])]
    loads = [one["load"] for one in results["measurements"] if "load" in one]
    if loads:
        lines += ["", f"load before a measurement: {min(loads):.2f} to {max(loads):.2f}"]
    if results.get("stopped"):
        lines.append("stopped before its end: some have fewer runs")
    return "\n".join(lines)


def _table(workload: str, found: Sequence[Row], arguments: Mapping[str, Any]) -> list[str]:
    jobs = arguments["latency_jobs" if workload == "idle" else "jobs"]
    cells = _latencies if workload == "idle" else partial(_rates, limit=_limit(found))
    lines = [f"{TITLES[workload].format(**arguments)}, {arguments['runs']} runs: median (min to max)"]
    lines.append(" " * WIDTH + "".join(f"{head:>{CELL}}" for head in HEADS[workload]))
    for row in found:
        name = row.name if row.jobs == jobs else f"{row.name} ({row.jobs} jobs)"
        text = f"  not run: {row.why_not}" if row.why_not else "".join(f"{cell:>{CELL}}" for cell in cells(row))
        lines.append(f"{name:<{WIDTH}}{text}")
    return lines


def _latencies(row: Row) -> list[str]:
    return [_cell(row.figures[f"{name} p{percent}"], 2) for name in LATENCIES for percent in PERCENTS]


def _rates(row: Row, limit: float | None) -> list[str]:
    accepted, finished = row.figures.get("accepted_per_second"), row.figures["finished_per_second"]
    return [
        "" if accepted is None else _cell(accepted, 1),
        _cell(finished, 1),
        "" if limit is None else f"{finished.median / limit:.1%}",
    ]


def _limit(found: Sequence[Row]) -> float | None:
    return next((row.figures["finished_per_second"].median for row in found if row.name == LIMIT and row.figures), None)


def _cell(of: Spread, digits: int) -> str:
    return f"{of.median:.{digits}f} ({of.min:.{digits}f} to {of.max:.{digits}f})"


def charts(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG documents by workload; who was not run has no bar."""
    found = {workload: rows(results, workload) for workload in WORKLOADS}
    drawn = {
        "idle": ("submit → first line of the script, p50, ms (logarithmic)", "first_line_ms p50", True),
        "burst": ("burst of single submissions, finished/s", "finished_per_second", False),
        "list": ("as one request, finished/s", "finished_per_second", False),
    }
    return {
        workload: bars(title, [Bar(row.name, row.figures[figure]) for row in found[workload] if row.figures], log)
        for workload, (title, figure, log) in drawn.items()
        if any(row.figures for row in found[workload])
    }
