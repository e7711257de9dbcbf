"""Latency on an idle system: one job after another, each posted when nothing else is going on.

The script is a plain bash script whose first line writes the wall clock as bash reads it (`EPOCHREALTIME`, a
variable: no process, no file but its own output). Nobody has to look for it while it runs: the outputs are
fetched when the series is over. Its cost is measured in each run (`marker_microseconds`), and most of it lies
behind the stamp.

The final state is waited for by one long poll, which is sent as soon as the job is accepted. That has the API and
PostgreSQL look at the job while it is on its way, so jobs go by twos: one that is left in peace gives the first line,
the next one the final state.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bench.apart import BenchError, answer, steady_clock
from bench.wire import Answer, Line, request
from core.states import FINAL

SCRIPT = '#!/bin/bash\necho "$EPOCHREALTIME"\n'
WARM_UP = 20
PEACE_SECONDS = 0.05
WAIT_SECONDS = 8.0
JOB_SECONDS = 10.0
_FINAL = frozenset(state.value for state in FINAL)
_STAMPS = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """One job, in seconds since the epoch: those of the client, PostgreSQL and bash read one clock."""

    posted: float
    accepted: float
    submit_time: float
    allocate_time: float
    start_time: float
    first_line: float
    end_time: float
    seen: float


@dataclass(frozen=True, slots=True)
class _Run:
    posted: float
    accepted: float
    seen: float
    job: dict[str, Any]


class Client:
    """What the series asks of the API."""

    def __init__(self, port: int) -> None:
        self._line = Line(port, JOB_SECONDS)
        self._port = port
        document = {"job": {"name": "bench", "account": "bench", "cpus_per_task": 1}, "script": SCRIPT}
        self._submission = request("POST", "/api/v1/jobs", port, document)

    def close(self) -> None:
        self._line.close()

    def run(self, peace_seconds: float) -> _Run:
        """Post one job, leave it in peace, then wait until it is over."""
        posted = time.time()
        got = self._line.ask(self._submission)
        accepted = time.time()
        job_id = _expect(got, 201).document["job_id"]
        time.sleep(peace_seconds)
        got = self._line.ask(request("GET", f"/api/v1/jobs/{job_id}?wait={WAIT_SECONDS:g}s&until=final", self._port))
        seen = time.time()
        if (job := _expect(got, 200).document)["state"] not in _FINAL:
            raise BenchError(f"job {job_id} is {job['state']} after {WAIT_SECONDS:g} s")
        return _Run(posted, accepted, seen, job)

    def sample(self, run: _Run) -> Sample:
        """Add the stamp that the script wrote."""
        if run.job["state"] != "COMPLETED":
            raise BenchError(f"job {run.job['job_id']} ended {run.job['state']}, {run.job['state_reason']}")
        got = self._line.ask(request("GET", f"/api/v1/jobs/{run.job['job_id']}/logs?stream=stdout", self._port))
        times = {name: _seconds(run.job[name]) for name in ("submit_time", "allocate_time", "start_time", "end_time")}
        stamp = _stamp(_expect(got, 200).body)
        return Sample(posted=run.posted, accepted=run.accepted, first_line=stamp, seen=run.seen, **times)


def _expect(got: Answer, status: int) -> Answer:
    if got.status != status:
        raise BenchError(f"answered {got.status} instead of {status}: {got.body[:300]!r}")
    return got


def _seconds(time_text: str) -> float:
    return datetime.fromisoformat(time_text).timestamp()


def _stamp(output: bytes) -> float:
    try:
        return float(output)
    except ValueError:
        raise BenchError(f"the script wrote {output[:100]!r}; EPOCHREALTIME needs bash 5") from None


def series(port: int, jobs: int, pause: float = 0.0) -> tuple[list[Sample], list[Sample]]:
    """`jobs` left in peace and `jobs` waited for, alternating, after a warm-up; with so many seconds before each."""
    with closing(Client(port)) as client:
        for _ in range(WARM_UP):
            client.run(0)
        runs: list[_Run] = []
        for number in range(2 * jobs):
            time.sleep(pause)
            runs.append(client.run(0 if number % 2 else PEACE_SECONDS))
        samples = [client.sample(run) for run in runs]
    return samples[::2], samples[1::2]


def milliseconds(samples: Sequence[Sample], start: str, end: str) -> list[float]:
    """The time from one moment of each job to another."""
    return [round((getattr(sample, end) - getattr(sample, start)) * 1000, 3) for sample in samples]


def marker_microseconds() -> float:
    """What the script's first line costs at most: the stamp and its write, with the loop around them here."""
    loop = f'for ((i = 0; i < {_STAMPS}; i++)); do echo "$EPOCHREALTIME"; done'
    with tempfile.TemporaryFile() as output:
        subprocess.run(("/bin/bash", "-c", loop), stdout=output, env={}, timeout=JOB_SECONDS, check=True)
        output.seek(0)
        stamps = output.read().split()
    return round((_stamp(stamps[-1]) - _stamp(stamps[0])) / (_STAMPS - 1) * 1e6, 1)


def main() -> int:
    """The entry of `python -m bench.latency`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()

    def work() -> object:
        with steady_clock():
            peaceful, waited = series(options.port, options.jobs, options.pause)
        return {
            "first_line_ms": milliseconds(peaceful, "posted", "first_line"),
            "final_ms": milliseconds(waited, "posted", "seen"),
            "first_line_while_waited_ms": milliseconds(waited, "posted", "first_line"),
            "steps_ms": {
                "posted to 201": milliseconds(peaceful, "posted", "accepted"),
                "posted to stored": milliseconds(peaceful, "posted", "submit_time"),
                "stored to allocated": milliseconds(peaceful, "submit_time", "allocate_time"),
                "allocated to started": milliseconds(peaceful, "allocate_time", "start_time"),
                "started to first line": milliseconds(peaceful, "start_time", "first_line"),
                "first line to ended": milliseconds(peaceful, "first_line", "end_time"),
                "ended to seen": milliseconds(waited, "end_time", "seen"),
            },
            "marker_microseconds": marker_microseconds(),
        }

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
