"""The pieces of bench/: what it computes and prints, and one very small run against a real system."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from bench import apart, latency, report
from bench.__main__ import arguments
from bench.apart import BenchError, measure
from bench.burst import Size, burst
from bench.machine import CpuTimes, facts, used
from bench.stack import Stack
from bench.wire import Answer, WireError, request, take
from core.settings import Settings
from tests.builders import MACHINE
from tests.system import running


def some_results(first_line: float = 9.0, finished: float = 300.0) -> dict[str, Any]:
    latencies = {name: [first_line, first_line + 1] for name, _ in report.LATENCIES}
    found = {
        "jobs": 100,
        "accepted_per_second": 900.0,
        "finished_per_second": finished,
        "cpu_seconds": {"api": 0.05, "worker": 0.1},
        "transactions": 20,
        "wal_bytes": 204800,
    }
    return {
        "machine": MACHINE,
        "durability": {"fsync": "on"},
        "arguments": {"jobs": 100, "connections": 16},
        "latency_load": 0.5,
        "latency": {**latencies, "steps_ms": {"posted to 201": [2.0]}},
        "bursts": [{"load": 0.5, "found": found}],
        "lists": [{"load": 0.5, "found": {**found, "finished_per_second": 2 * finished}}],
        "limits": [{"load": 0.5, "found": {"scripts_per_second": 1000.0}}],
    }


class Clocks:
    """Two clocks that go on by a microsecond at each look; `held_up` is how long a reading is interrupted, at first."""

    def __init__(self, held_up: float) -> None:
        self.now, self.step, self.held_up = 1000.0, 0.0, held_up

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    def time(self) -> float:
        wall = self.monotonic() + self.step
        self.now, self.held_up = self.now + self.held_up, 0.0
        return wall


def test_a_clock_is_steady_though_its_reading_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(held_up=0.01)
    monkeypatch.setattr(apart, "time", clocks)
    with apart.steady_clock():
        pass


@pytest.mark.parametrize("step", [0.01, -0.01])
def test_a_clock_that_was_set_makes_a_run_void(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    clocks = Clocks(held_up=0.0)
    monkeypatch.setattr(apart, "time", clocks)
    void = pytest.raises(BenchError, match=r"^the run is void: the clock was set by -?10\.0 ms meanwhile$")
    with void, apart.steady_clock():
        clocks.step = step


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(200, 0, -1)]
    assert [report.percentile(values, percent) for percent in (50, 95, 99, 100)] == [100, 190, 198, 200]
    assert report.percentile([7.0], 99) == 7.0


def test_the_table_says_what_was_met() -> None:
    table = report.render(some_results())
    assert table.count("   met") == 2
    assert "30.0%" in table
    assert "60.0%" in table  # as one list
    assert "worker                                                   1000" in table
    assert "0.20 writing transactions, 2.0 KiB of WAL" in table


def test_the_table_says_what_was_not_met() -> None:
    assert report.render(some_results(first_line=12.1, finished=249.0)).count("NOT MET") == 2


def test_what_was_left_out_is_not_measured() -> None:
    measured = ("latency", "bursts", "lists", "limits")
    results = {key: value for key, value in some_results().items() if key not in measured}
    assert report.render(results).count("not measured") == 2


def test_the_command_line() -> None:
    plain = arguments([])
    assert (plain.jobs, plain.connections, plain.latency_jobs, plain.runs, plain.json) == (2000, 16, 200, 3, None)
    given = arguments(["--jobs", "5", "--latency-jobs", "0", "--json", "file"])
    assert (given.jobs, given.latency_jobs, given.json) == (5, 0, Path("file"))
    with pytest.raises(SystemExit):
        arguments(["--connections", "0"])


def test_dear_files_are_warned_of() -> None:
    results = some_results()
    assert "new files are dear" not in report.render(results)
    results["machine"] = {**MACHINE, "file_microseconds": 300.0}
    assert "new files are dear" in report.render(results)


def test_the_machines_facts(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert 1 <= found.usable_cpus <= found.cpus
    assert found.file_microseconds > 0
    assert found.filesystem in ("unknown", *Path("/proc/filesystems").read_text().split())


def test_what_nobody_of_ours_used_was_used_by_others() -> None:
    before, after = CpuTimes(10.0, {"api": 1.0}), CpuTimes(14.0, {"api": 2.5, "worker": 0.5})
    assert used(before, after, 0.25) == {"api": 1.5, "worker": 0.5, "load generator": 0.25, "others": 1.75}


def test_an_answer_is_taken_when_it_is_whole() -> None:
    head = b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\n"
    buffer = bytearray(head + b"hel")
    assert take(buffer) is None
    buffer += b"lo" + head + b"again"
    assert [take(buffer), take(buffer), take(buffer)] == [Answer(201, b"hello"), Answer(201, b"again"), None]
    with pytest.raises(WireError):
        take(bytearray(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"))


def test_a_request_is_what_the_api_reads() -> None:
    head, _, body = request("POST", "/x", 80, {"a": 1}).partition(b"\r\n\r\n")
    assert body == b'{"a": 1}'
    assert head.splitlines()[1:] == [
        b"Host: 127.0.0.1:80",
        b"Content-Length: 8",
        b"Content-Type: application/json",
    ]


def test_the_bare_limit_and_a_measurement_that_fails() -> None:
    assert measure("bench.spawn", "--jobs", 5, seconds=30)["scripts_per_second"] > 0
    with pytest.raises(BenchError, match=r"^bench\.latency: .*refused"):
        measure("bench.latency", "--port", 1, "--jobs", 1, seconds=30)


@pytest.mark.anyio
async def test_a_very_small_run(settings: Settings, tmp_path: Path) -> None:
    async with running(settings, tmp_path) as system:
        port = int(system.api.address.rpartition(":")[2])
        target = Stack(os.getpid(), port, settings.postgres_dsn)
        for as_list in (False, True):
            result = await burst(target, Size(jobs=5, connections=2, warm_up=2, as_list=as_list), seconds=30)
            assert result.jobs == 5
            assert result.finished_per_second > 0
            assert result.cpu_seconds.keys() >= {"api", "scheduler", "worker", "scripts"}
        peaceful, waited = await asyncio.to_thread(latency.series, port, 1)
    for sample in (*peaceful, *waited):
        assert sample.posted < sample.allocate_time <= sample.start_time < sample.first_line < sample.end_time
        assert sample.end_time < sample.seen
