"""The workloads of scale in bench/: what they compute and print, what they replace, one very small run."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from bench import history, rates, scale, watchers, width, worker
from bench.apart import BenchError
from bench.rates import LISTS, Size, measured, rate
from bench.stack import Stack
from bench.statements import AT_ONCE, touched
from core.settings import Settings
from services.worker import proc, process
from services.worker.spool import Exit
from tests.system import running


def a_point(label: int, submit: float, pages: int = 10, kib: int = 1024) -> dict[str, Any]:
    found = {
        "rates": {"submit": submit, "cancel": 100.0},
        "buffers": {"look": pages},
        "memory_kib": {"api": kib, "postgres": 10 * kib},
    }
    return {"label": label, "load": 0.5, "found": found}


def test_points_are_measured_in_pairs_that_alternate() -> None:
    assert scale.schedule([1, 10, 100], 4) == [1, 10, 100, 100, 1, 1, 100, 100, 1]
    assert scale.schedule([5], 3) == [5]


def test_numbers_of_jobs_as_an_argument() -> None:
    assert scale.counts("0,1000") == [0, 1000]
    for wrong in ("1,1", "-1,2", "many"):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            scale.counts(wrong)


def test_a_ratio_is_the_median_over_the_pairs() -> None:
    """Each of two runs one after the other: the machine itself is faster now and slower then."""
    points = [a_point(n, s) for n, s in [(1, 100), (9, 90), (9, 18), (1, 20), (1, 50), (9, 5)]]
    assert scale.ratio(points, "rates", "submit") == 0.9
    assert scale.ratio(points[:1], "rates", "submit") is None
    assert scale.ratio(points, "rates", "nothing") is None


def test_the_worst_of_each_kind_decides() -> None:
    good = scale.point_targets([a_point(1, 100), a_point(9, 80, pages=15, kib=1228)])
    assert [target.met for target in good] == [True, True, True]
    bad = scale.point_targets([a_point(1, 100), a_point(9, 79, pages=16, kib=1300)])
    assert [target.met for target in bad] == [False, False, False]
    assert [target.measured for target in bad] == ["0.79 (submit)", "1.60 (look)", "1.27 (api)"]
    assert [target.met for target in scale.point_targets([a_point(1, 100)])] == [None, None, None]


def test_the_table_of_points() -> None:
    table = "\n".join(scale.point_lines({"points": [a_point(1000, 100), a_point(1000000, 50)]}))
    assert "1,000,000   last/first" in table
    assert "  submit                                            100.0         50.0         0.50" in table
    assert "  postgres                                           10.0         10.0         1.00" in table
    assert table.count("NOT MET") == 1


def test_the_pages_of_a_plan_are_those_of_its_root_and_of_what_is_written_after_it() -> None:
    """What is read by nobody is done at the end, and not within the root."""

    def a_node(pages: int, *below: dict[str, Any], **more: str) -> dict[str, Any]:
        return {"Shared Hit Blocks": pages, "Shared Read Blocks": 1, "Plans": below, **more}

    names = ("Subplan Name", "CTE Name")
    moved = a_node(10, **{names[0]: "CTE moved"})
    logged = a_node(5, a_node(0, **{names[1]: "moved"}), **{names[0]: "CTE logged"})
    assert touched(a_node(20, moved, logged, a_node(3, **{names[1]: "moved"}))) == 21 + 6


def test_a_rate_is_that_of_the_middle() -> None:
    assert rate([float(second) for second in range(101)]) == 1.0
    assert rate([0.0, *(100 + second / 10 for second in range(99)), 1000.0]) == pytest.approx(10)
    with pytest.raises(BenchError):
        rate([1.0, 1.0])


def test_every_node_is_somebodys() -> None:
    assert width.shares(5, 2) == [(1, 2), (3, 3)]
    assert width.shares(1, 1) == [(1, 1)]


def test_what_is_not_real_is_there_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(process, "start"), (proc, "all_pids")]
    for module, name in places:
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    before = [getattr(module, name) for module, name in places]
    worker.replace_what_is_not_real()
    assert all(getattr(module, name) is not old for (module, name), old in zip(places, before, strict=True))


@pytest.mark.anyio
async def test_a_script_that_ends_at_once_is_one_to_the_worker() -> None:
    script: process.Script = await worker.end_at_once(("/bin/sh", "script"), tag=1)
    await process.sweep(script)
    assert (await script.wait(), script.members()) == (Exit(0, None), [])
    script.forget()


def test_the_table_of_widths() -> None:
    found = {
        **{f"{name}_per_second": 3000.0 for name in ("allocated", "started", "ended")},
        "nodes": 1000,
        "jobs": 1000,
        "passes": [[0.0, 0.051, 0.02, 500]],
        "locks": {"most": 7, "waiting": 1},
        "memory_kib": {"postgres": 2048},
        "idle_cpus": {},
        "cpu_seconds": {"worker": 1.0},
        "connections": 2000,
    }
    table = "\n".join(width.lines({"widths": [{"nodes": 1000, "load": 0.5, "found": found}]}))
    assert "connections of a node                              2.00" in table
    assert "3,000/s   met" in table
    assert "51.0 ms   NOT MET" in table


def test_the_table_of_watchers() -> None:
    def a_run(finished: float, late: dict[str, float]) -> dict[str, Any]:
        burst = {"jobs": 10, "accepted_per_second": 1.0, "finished_per_second": finished, "cpu_seconds": {"api": 0.01}}
        sizes = {when: {"api": 2048} for when in ("before", "waiting", "after")}
        found = {"burst": burst, "memory_kib": sizes, "followed": 3, "late_ms": late, "reads": {"200": 4}}
        return {"load": 0.5, "found": {**found, "crowd_cpu_seconds": 0.1}}

    alone, watched = a_run(200, {}), a_run(150, {"50": 5.0, "95": 6.0, "99": 7.0})
    arguments = {"jobs": 10, "polls": 6, "readers": 2}
    table = "\n".join(watchers.lines({"arguments": arguments, "alone": [alone], "watched": [watched]}))
    assert "as part of that without: 0.75" in table
    assert "  api                                                       1,000        1,000" in table


def test_what_is_void_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise BenchError("the run is void")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scale.signal, "signal", lambda *_: None)  # that of the tests stays
    monkeypatch.setattr(history, "measure_points", refuse)
    assert history.main(["--finished", "0,10", "--json", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "bench: the run is void"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_a_very_small_run(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_LISTS", 4)
    async with running(settings, tmp_path, workers={"n1": AT_ONCE}) as system:
        port = int(system.api.address.rpartition(":")[2])
        target = Stack(os.getpid(), port, settings.postgres_dsn)
        found = await measured(target, Size(waiting=60, finished=20, jobs=40, connections=2), seconds=60)
    assert found.rates.keys() == {"submit", "cancel", "start and end", *(f"list: {name}" for name in LISTS)}
    assert min(found.rates.values()) > 0
    assert found.memory_kib.keys() >= {"api", "scheduler", "worker"}
    assert found.cpu_microseconds.keys() == found.rates.keys()
    assert found.buffers["turn_over"] > found.buffers["start"] > found.buffers["get"] > 0
