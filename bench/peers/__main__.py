"""`python -m bench.peers`: idle latency and bursts, the same for Rowlock and for every peer that is installed.

::

    run 1: idle (each contender in turn), burst (each), list (each)  ->  run 2: the same backwards  ->  …
                                                                     ->  JSON, tables, a chart for each

Each measurement has a fresh directory; nothing is deleted before the last is over.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine, stack
from bench.__main__ import RESULTS, count, note, stop
from bench.apart import BenchError
from bench.peers.contenders import CONNECTIONS, CPUS, WORKLOADS, Contender, Task, contenders
from bench.peers.install import install, pins
from bench.peers.table import charts, render


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Measure Rowlock beside its peers.")
    parser.add_argument("--runs", type=count, default=5, metavar="N", help="of each workload (5)")
    parser.add_argument("--jobs", type=count, default=5000, metavar="N", help="jobs of a burst (5000)")
    parser.add_argument("--latency-jobs", type=count, default=200, metavar="N", help="one after another (200)")
    parser.add_argument("--pause", type=float, default=0.2, metavar="S", help="seconds between two of these (0.2)")
    parser.add_argument("--slow-jobs", type=count, default=100, metavar="N", help="the most that Slurm gets (100)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender; may be repeated (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results (bench/results/peers-TIME.json)")
    commands = parser.add_subparsers(dest="command", metavar="", title="instead of measuring")
    installing = commands.add_parser("install", help="install what PyPI has of the peers into .bench/")
    installing.add_argument("--apt", action="store_true", help="what Debian has too, into the system, as root")
    drawing = commands.add_parser("draw", help="print the tables of results and draw their charts again")
    drawing.add_argument("file", type=Path, help="a JSON file")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, or until a Ctrl-C: that may take hours. Raises BenchError when a name is unknown."""
    chosen = choose(contenders(), options.only)
    results: dict[str, Any] = {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "arguments": {
            **{name: getattr(options, name) for name in ("runs", "jobs", "latency_jobs", "pause", "slow_jobs")},
            "cpus": CPUS,
            "connections": CONNECTIONS,
        },
        "contenders": [one.name for one in chosen],
        "versions": pins(),
        "measurements": [],
    }
    with stack.workspace() as folder:
        results["machine"] = asdict(machine.facts(folder))
        void: dict[tuple[str, str], str] = {}
        try:
            for number, workload, one in turns(chosen, options.runs):
                found = _measured(folder, one, _task(one, workload, options), void)
                results["measurements"].append({"run": number, "workload": workload, "name": one.name, **found})
        except KeyboardInterrupt:
            results["stopped"] = True
    return results


def choose(known: Sequence[Contender], names: Sequence[str] | None) -> list[Contender]:
    """Those that are asked for, all if none is. Raises BenchError."""
    if unknown := set(names or ()) - {one.name for one in known}:
        all_names = ", ".join(one.name for one in known)
        raise BenchError(f"there is no {', '.join(sorted(unknown))}; there are {all_names}")
    return [one for one in known if not names or one.name in names]


def turns(chosen: Sequence[Contender], runs: int) -> Iterator[tuple[int, str, Contender]]:
    """Who is measured when: workload by workload, each run in the other direction than the one before."""
    for number in range(1, runs + 1):
        for workload in WORKLOADS:
            for one in chosen if number % 2 else reversed(chosen):
                if workload in one.workloads:
                    yield number, workload, one


def _task(one: Contender, workload: str, options: argparse.Namespace) -> Task:
    jobs: int = options.latency_jobs if workload == "idle" else options.jobs
    return Task(workload, min(jobs, options.slow_jobs) if one.slow else jobs, options.pause)


def _measured(folder: Path, one: Contender, task: Task, void: dict[tuple[str, str], str]) -> dict[str, Any]:
    """What was found, with the load average before it; or why nothing was. What has failed once is not tried again."""
    key, load = (one.name, task.workload), machine.load()
    if key not in void:
        try:
            found = one.run(folder, task)
        except BenchError as error:
            void[key] = str(error).partition("\n")[0]
            note(f"{task.workload}, {one.name}: not run: {error}")
        else:
            note(f"{task.workload}, {one.name}: done (load {load:.2f})")
            return {"jobs": task.jobs, "load": load, "found": found}
    return {"jobs": task.jobs, "why_not": void[key]}


def save(results: dict[str, Any], file: Path | None) -> None:
    """Write the results, and make of them what can be made."""
    path = file or RESULTS / f"peers-{results['time'].replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, path)


def draw(results: dict[str, Any], path: Path) -> None:
    """Print the tables, and write the charts beside `path`."""
    print(render(results))
    for workload, chart in charts(results).items():
        path.with_name(f"{path.stem}-{workload}.svg").write_text(chart)
    print(f"results: {path}, charts beside it")


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was tried; 1 with one line when nothing could be."""
    options = arguments(sys.argv[1:] if words is None else words)
    signal.signal(signal.SIGTERM, stop)
    try:
        match options.command:
            case "install":
                install(apt=options.apt)
            case "draw":
                draw(json.loads(options.file.read_text()), options.file)
            case _:
                save(run(options), options.json)
    except BenchError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
