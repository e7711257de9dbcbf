"""The pieces of bench/peers/ that need no peer: who is measured when, what is made of it, and what drivers share."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import latency, spawn
from bench.apart import BenchError
from bench.peers import __main__ as command
from bench.peers import contenders, drive, install, table
from bench.peers.chart import Bar, bars
from bench.peers.contenders import LIMIT, ROWLOCK, Contender, Task
from bench.report import Spread
from tests.builders import MACHINE

IDLE = Task("idle", jobs=5, pause=0.0)


def never(*_: object) -> Mapping[str, Any]:
    raise AssertionError("it was not to run")


def a_contender(name: str, **more: Any) -> Contender:
    return Contender(name, more.pop("workloads", ("idle", "burst")), more.pop("run", never), **more)


def measured(name: str, workload: str, jobs: int, **found: Any) -> dict[str, Any]:
    return {"name": name, "workload": workload, "jobs": jobs, "load": 0.5, "found": found}


def some_results() -> dict[str, Any]:
    rates = {"Rowlock": (300, 500, 400), "arq": (100, 90, 110), LIMIT: (1000, 900, 800)}
    measurements = [
        measured(
            name,
            "burst",
            50,
            finished_per_second=float(rate),
            **({} if name == LIMIT else {"accepted_per_second": 9.0}),
        )
        for run in range(3)
        for name, all_rates in rates.items()
        for rate in [all_rates[run]]
    ]
    for first_line in (4.0, 6.0, 5.0):
        samples = [first_line] * 98 + [50.0] * 2
        measurements.append(measured(ROWLOCK, "idle", 100, first_line_ms=samples, final_ms=samples))
    measurements.append({"name": "RQ", "workload": "idle", "jobs": 100, "why_not": "rq is not installed: …"})
    measurements.append(measured("Slurm", "burst", 7, accepted_per_second=8.0, finished_per_second=3.0))
    measurements.append({"name": "Slurm", "workload": "burst", "jobs": 7, "why_not": "no munged | its last words"})
    return {
        "machine": MACHINE,
        "arguments": {"runs": 3, "jobs": 50, "latency_jobs": 100, "pause": 0.2},
        "contenders": [LIMIT, ROWLOCK, "arq", "RQ", "Slurm"],
        "measurements": measurements,
    }


def test_each_run_goes_the_other_way() -> None:
    chosen = [a_contender("limit", workloads=("burst",)), a_contender("a"), a_contender("b")]
    turns = [(number, workload, one.name) for number, workload, one in command.turns(chosen, 3)]
    first = [("idle", "a"), ("idle", "b"), ("burst", "limit"), ("burst", "a"), ("burst", "b")]
    second = [("idle", "b"), ("idle", "a"), ("burst", "b"), ("burst", "a"), ("burst", "limit")]
    assert turns == [(run, *turn) for run, order in ((1, first), (2, second), (3, first)) for turn in order]


def test_only_those_who_are_asked_for() -> None:
    known = [a_contender("a"), a_contender("b")]
    assert command.choose(known, None) == known
    assert command.choose(known, ["b"]) == known[1:]
    with pytest.raises(BenchError, match=r"^there is no c; there are a, b$"):
        command.choose(known, ["b", "c"])


def test_the_names_are_those_of_drivers() -> None:
    folder = Path(contenders.__file__).parent
    found = {one.name for one in contenders.contenders()}
    assert len(found) == len(contenders.contenders())
    for package in ("hyperqueue", "arq", "rq", "celery", "dramatiq", "procrastinate"):
        assert (folder / f"{package}.py").is_file()
        assert package in install.pins()


def test_figures_are_medians_with_min_and_max() -> None:
    found = {row.name: row for row in table.rows(some_results(), "burst")}
    assert list(found) == [LIMIT, "Rowlock", "arq", "Slurm"]
    assert found["Rowlock"].figures["finished_per_second"] == Spread(400, 300, 500)
    [rowlock, rq] = table.rows(some_results(), "idle")
    assert rowlock.figures["first_line_ms p50"] == Spread(5, 4, 6)
    assert rowlock.figures["first_line_ms p99"] == Spread(50, 50, 50)
    assert (rq.name, rq.figures) == ("RQ", {})


def test_the_table_says_what_was_not_run() -> None:
    lines = table.render(some_results()).splitlines()
    assert re.search(r"^Rowlock .* 400\.0 \(300\.0 to 500\.0\) +44\.4%$", "\n".join(lines), re.MULTILINE)
    assert [line for line in lines if line.startswith("RQ")] == [f"{'RQ':<28}  not run: rq is not installed: …"]
    # What failed in one run has no figure at all.
    assert [line for line in lines if line.startswith("Slurm")] == [
        f"{'Slurm (7 jobs)':<28}  not run: no munged | its last words"
    ]


def test_a_chart_is_well_formed_and_shows_who_ran() -> None:
    drawn = table.charts(some_results())
    assert drawn.keys() == {"idle", "burst"}
    texts = [element.text for element in ElementTree.fromstring(drawn["burst"]).iter() if element.text]
    assert "arq" in texts
    assert "Slurm" not in texts


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bars_are_as_long_as_their_values(logarithmic: bool) -> None:
    shown = [Bar("a < b & c", Spread(1.0, 1.0, 1.0)), Bar("Rowlock", Spread(100.0, 90.0, 110.0))]
    document = ElementTree.fromstring(bars("title & more", shown, logarithmic))
    lengths = [float(element.attrib["width"]) for element in document.iter() if element.tag.endswith("rect")]
    assert 0 < lengths[0] < lengths[1]


def test_what_has_failed_is_not_tried_again(tmp_path: Path) -> None:
    def fails(*_: object) -> Mapping[str, Any]:
        tries.append(1)
        raise BenchError("it broke\nmore of it")

    tries: list[int] = []
    void: dict[tuple[str, str], str] = {}
    for _ in range(2):
        assert command._measured(tmp_path, a_contender("b", run=fails), IDLE, void)["why_not"] == "it broke"
    assert len(tries) == 1


def test_who_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    others = [one for one in contenders.contenders() if one.name not in (LIMIT, ROWLOCK)]
    for one in others:
        with pytest.raises(BenchError, match=r": python -m bench\.peers install"):
            one.run(tmp_path, IDLE)


def test_pins_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in install.pins().values())
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path / "requirements.txt")
    install.REQUIREMENTS.write_text("# some\narq==1.0  # here\n\nrq>=2\n")
    with pytest.raises(BenchError, match=r"^requirements\.txt should pin rq>=2 by ==$"):
        install.pins()


def test_results_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps(some_results()))
    assert command.main(["draw", str(file)]) == 0
    assert "Rowlock" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some-burst.svg", "some-idle.svg", "some.json"]


def test_a_driver_that_breaks_is_one_line_with_the_last_words_of_its_logs(tmp_path: Path) -> None:
    (tmp_path / "worker-1.log").write_text("starting\nno such queue\n")
    assert contenders._last_words(tmp_path) == " | starting | no such queue"


class Bare(drive.Client):
    """A peer that is none: it runs a job at once, as the task of a peer would."""

    def __init__(self, orders: drive.Orders) -> None:
        self.orders = orders

    async def submit(self, number: int) -> float:
        return drive.run_script(self.orders.script, self.orders.output(number))

    async def submit_list(self, numbers: Sequence[int]) -> list[float]:
        return [drive.run_script(self.orders.script, self.orders.output(number)) for number in numbers]

    async def wait(self, job: float, poll: float, seconds: float) -> float:
        return job


@asynccontextmanager
async def bare(orders: drive.Orders) -> AsyncIterator[drive.Client]:
    yield Bare(orders)


def some_orders(folder: Path, workload: str) -> drive.Orders:
    contenders._lay_out(folder, workload)
    return drive.Orders(workload=workload, jobs=3, pause=0.0, cpus=8, folder=folder, variant="")


@pytest.fixture
def any_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's may be set while a test runs."""
    monkeypatch.setattr(drive, "steady_clock", nullcontext)


@pytest.mark.usefixtures("any_clock")
@pytest.mark.parametrize("workload", ["burst", "list"])
def test_a_driver_measures_a_burst(tmp_path: Path, workload: str) -> None:
    orders = some_orders(tmp_path, workload)
    assert Path(orders.script).read_text() == spawn.SCRIPT
    found = asyncio.run(drive._measured(orders, bare))
    assert found["jobs"] == 3
    assert min(found["accepted_per_second"], found["finished_per_second"]) > 0


@pytest.mark.usefixtures("any_clock")
def test_a_driver_measures_latency_by_the_scripts_own_stamp(tmp_path: Path) -> None:
    orders = some_orders(tmp_path, "idle")
    assert Path(orders.script).read_text() == latency.SCRIPT
    found = asyncio.run(drive._measured(orders, bare))
    for first_line, final in zip(found["first_line_ms"], found["final_ms"], strict=True):
        assert 0 < first_line < final


@pytest.mark.usefixtures("any_clock")
def test_a_script_that_did_not_run_makes_a_burst_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgets(self: Bare, number: int) -> float:
        return time.time()

    monkeypatch.setattr(Bare, "submit", forgets)
    with pytest.raises(BenchError, match=r"^the run is void: 3 of 3 scripts left no output$"):
        asyncio.run(drive._measured(some_orders(tmp_path, "burst"), bare))


def a_worker(code: str, ready: str) -> drive.Worker:
    return drive.Worker((sys.executable, "-IS", "-c", code), ready)


def test_workers_are_ready_one_after_the_other_and_gone_afterwards(tmp_path: Path) -> None:
    code = "import os, time; print('pid', os.getpid(), '.', flush=True); time.sleep(1000)"
    with drive.working(tmp_path, [a_worker(code, " .")] * 2):
        pids = [int((tmp_path / f"worker-{number}.log").read_text().split()[1]) for number in (1, 2)]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match=r"ended with exit code 3 as it started$"),
        drive.working(tmp_path, [a_worker("raise SystemExit(3)", "never")]),
    ):
        pytest.fail("it was never ready")
