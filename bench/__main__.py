"""`python -m bench`: latency on an idle system, a burst, and the machine's own limit, in one run.

::

    the machine's facts  ->  latency  ->  limit, burst, list, limit, burst, list, ...  ->  JSON, a table, targets

Each measurement runs in a process of its own; each stack is new, in a fresh directory.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from bench import machine, report, stack
from bench.apart import BenchError, measure

RESULTS = Path(__file__).parent / "results"
CPUS = 8
SLOWEST_PER_SECOND = 20  # slower than that is given up


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Rowlock on this machine.")
    parser.add_argument("--jobs", type=count, default=2000, metavar="N", help="jobs of a burst (2000)")
    parser.add_argument("--connections", type=count, default=16, metavar="N", help="that post it (16)")
    parser.add_argument("--latency-jobs", type=int, default=200, metavar="N", help="0 leaves it out (200)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="bursts and limits; 0 leaves them out (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (bench/results/TIME.json)")
    return parser.parse_args(words)


def count(text: str) -> int:
    """A number from 1 on, as an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("should be at least 1")
    return number


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything. Raises BenchError."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    given = {"jobs": options.jobs, "connections": options.connections, "cpus": CPUS}
    results: dict[str, Any] = {"time": now, "arguments": given}
    with stack.workspace() as folder:
        results["machine"] = asdict(machine.facts(folder))
        note(report.machine_line(results["machine"]))
        if options.latency_jobs > 0:
            results |= _latency(folder, options.latency_jobs)
        results["limits"], results["bursts"], results["lists"] = [], [], []
        for number in range(1, options.runs + 1):
            results["limits"].append(_loaded(f"limit {number}", lambda: _limit(options.jobs)))
            results["bursts"].append(_loaded(f"burst {number}", lambda: _burst(folder, options)))
            results["lists"].append(_loaded(f"list {number}", lambda: _burst(folder, options, "--list")))
            for kind in ("bursts", "lists"):
                results["durability"] = results[kind][-1]["found"].pop("durability")
    return results


def _loaded(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, with the load average before it."""
    load = machine.load()
    found = work()
    rates = ", ".join(f"{key.replace('_per_second', '/s')} {value}" for key, value in found.items() if "_per_s" in key)
    note(f"{name}: {rates} (load {load:.2f})")
    return {"load": load, "found": found}


def _latency(folder: Path, jobs: int) -> dict[str, Any]:
    note("latency: one job after another")
    load = machine.load()
    with stack.running(folder, CPUS) as running:
        durability = asyncio.run(stack.durability(running.database_url))
        found = measure("bench.latency", "--port", running.port, "--jobs", jobs, seconds=60 + 2 * jobs)
    return {"durability": durability, "latency": found, "latency_load": load}


def _limit(jobs: int) -> dict[str, Any]:
    found: dict[str, Any] = measure(
        "bench.spawn", "--jobs", jobs, "--at-once", CPUS, seconds=60 + jobs / SLOWEST_PER_SECOND
    )
    return found


def _burst(folder: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    seconds = 60 + options.jobs / SLOWEST_PER_SECOND
    size = ("--jobs", options.jobs, "--connections", options.connections, "--seconds", seconds)
    with stack.running(folder, CPUS) as running:
        durability = asyncio.run(stack.durability(running.database_url))
        place = ("--port", running.port, "--pid", running.pid, "--database", running.database_url)
        return {**measure("bench.burst", *place, *size, *more, seconds=seconds + 30), "durability": durability}


def note(text: str) -> None:
    """Tell how far it is, where it does not mix with the results."""
    print(text, file=sys.stderr, flush=True)


def stop(number: int, _frame: object) -> NoReturn:
    """Answer a signal so that what was begun is ended on the way out."""
    raise SystemExit(128 + number)


def save(results: dict[str, Any], file: Path | None) -> Path:
    """Write the results; where they are."""
    path = file or RESULTS / f"{results['time'].replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was measured, whether or not a target is met; 1 with one line when a run is void."""
    options = arguments(sys.argv[1:] if words is None else words)
    signal.signal(signal.SIGTERM, stop)
    try:
        results = run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    path = save(results, options.json)
    print(report.render(results))
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
