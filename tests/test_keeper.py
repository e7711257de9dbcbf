"""Jobs outlive their worker: killed, stopped and replaced, with real keepers and real scripts."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from core.documents import JobDocument
from core.errors import SettingsError
from services.worker.node import hold_spool
from services.worker.proc import read_stat
from services.worker.spool import Exit, Leader, Spool
from tests.builders import settings_for
from tests.conftest import Databases
from tests.system import ROOT, System, alive_with, beside, cmdline, running, until

pytestmark = pytest.mark.anyio

WAITS = "#!/bin/bash\nulimit -c 0\necho up\nwhile [ ! -e go ]; do sleep 0.02; done\n"


@pytest.fixture(scope="module")
async def servers(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    """An API and a scheduler for all tests."""
    folder = tmp_path_factory.mktemp("servers")
    async with databases.one() as url, running(settings_for(url, redis_url, folder), folder, workers={}) as found:
        yield found


@pytest.fixture
async def system(servers: System, tmp_path: Path) -> AsyncIterator[System]:
    """With a worker of the test's own."""
    async with beside(servers, tmp_path, {tmp_path.name: 16}, heartbeat_seconds=0.5, lease_seconds=10.0) as found:
        yield found


HIDES = (
    'while [ "$(stat -c %Y "$0")" != $$ ]; do sleep 0.02; done\n'  # until its worker has noted its process there
    "ulimit -S -x unlimited\n"
)
"""Takes off the tag; what is left to do is to spoil the note on the script's file."""


async def up(system: System, script: str, **job: object) -> int:
    """Submit, and wait until the script itself has spoken."""
    submitted = await system.submit(script, **job)
    await system.says(submitted["job_id"], b"up")
    return submitted["job_id"]


def data_of(system: System) -> Path:
    return system.folder / system.node / "data"


def kill_worker(system: System) -> None:
    os.kill(system.worker_pid(), signal.SIGKILL)


def let_go(system: System, job_id: int) -> None:
    (data_of(system) / f"jobs/{job_id}/go").touch()


async def ended(system: System, job_id: int) -> tuple[str, int | None, str | None]:
    job: JobDocument = await system.api.wait(job_id, timeout_seconds=60)
    return job["state"], job["exit_code"], job["signal"]


async def adopted(system: System) -> None:
    """Wait until a worker has found a job that it did not start."""

    async def settled() -> bool:
        return "job_adopted" in (system.settings.log_dir / "worker.log").read_text()

    await until(settled, "a job is adopted")


async def new_worker(system: System, old: int) -> None:
    async def changed() -> bool:
        mine = [pid for pid in alive_with(str(system.folder / system.node)) if "services.worker.kept" in cmdline(pid)]
        return bool(mine) and mine != [old]

    await until(changed, "the keeper starts the worker again")


async def test_kill_9_of_the_worker_changes_nothing_but_the_time(system: System) -> None:
    ends = {"exit 137": ("FAILED", 137, None), "kill -9 $$": ("FAILED", None, "KILL"), "exit 0": ("COMPLETED", 0, None)}
    jobs = {end: await up(system, WAITS + end) for end in ends}
    for _ in range(3):
        old = system.worker_pid()
        kill_worker(system)
        await new_worker(system, old)
    assert {(await system.api.job(job_id))["state"] for job_id in jobs.values()} == {"RUNNING"}
    for job_id in jobs.values():
        let_go(system, job_id)
    assert {end: await ended(system, job_id) for end, job_id in jobs.items()} == ends
    assert {(await system.api.job(job_id))["attempt"] for job_id in jobs.values()} == {1}
    assert await system.cpus_in_use() == 0
    spool = Spool(data_of(system) / "scripts")
    assert not list((spool.folder / "exits").iterdir())


async def test_a_job_that_ends_while_no_worker_is_alive(system: System) -> None:
    """From the end of a worker to the start of the next, scripts end: exit code, signal and escapees are all known."""
    name = uuid4().hex
    escapes = f"env -i setsid bash -c 'exec -a {name} sleep 1000' & "
    ends = {"exit 137": ("FAILED", 137, None), "kill -9 $$": ("FAILED", None, "KILL")}
    jobs = {end: await up(system, WAITS + escapes + end) for end in ends}
    limited = await up(system, "#!/bin/bash\necho up; sleep 1000", time_limit=0.04)
    system.children[-1].process.send_signal(signal.SIGTERM)
    await system.children[-1].wait()
    assert {(await system.api.job(job_id))["state"] for job_id in jobs.values()} == {"RUNNING"}
    for job_id in jobs.values():
        let_go(system, job_id)
    records = data_of(system) / "scripts/.spool/exits"

    async def recorded() -> bool:
        return len(list(records.iterdir())) >= 2

    await until(recorded, "the lingering keeper writes what it saw")
    assert alive_with(name)
    system.start_worker(system.node, 16)
    assert {end: await ended(system, job_id) for end, job_id in jobs.items()} == ends
    assert (await ended(system, limited))[0] == "TIMEOUT"
    assert not alive_with(name)
    assert await system.cpus_in_use() == 0

    async def keeper_ended() -> bool:
        return len(list((records.parent / "keepers").iterdir())) == 1

    await until(keeper_ended, "the lingering keeper ends once it keeps nothing")


async def test_what_its_worker_did_not_come_to_start_is_not_started_after_its_cancel(system: System) -> None:
    first = system.children[-1]
    system.start_worker(system.node, 16, ROWLOCK_CRASH="worker.started")
    crashes = system.children[-1]
    assert await first.wait() == 3
    stat = read_stat(system.worker_pid())
    assert stat is not None
    os.kill(stat.parent, signal.SIGSTOP)  # the keeper, which would start it again before the cancel
    job = {"account": "test", "partition": system.partition}
    [job_id] = await system.api.submit_many([(job, "#!/bin/bash\necho up")])  # as a list, it goes by the scheduler
    await system.state_is(job_id, "RUNNING")
    await system.api.cancel(job_id)
    os.kill(stat.parent, signal.SIGKILL)
    await crashes.wait()
    system.start_worker(system.node, 16)
    assert await ended(system, job_id) == ("CANCELLED", None, None)
    assert not (data_of(system) / f"jobs/{job_id}").exists()  # a start makes it
    assert await system.cpus_in_use() == 0


TRAPS = "#!/bin/bash\ntrap 'touch told' TERM\n{}\necho up\nwhile :; do sleep 0.02; done\n"


@pytest.mark.parametrize(
    ("why", "spoilt"),
    [
        ("CANCELLED", "nothing"),
        ("CANCELLED", "its file"),
        ("CANCELLED", "the disk"),
        ("TIMEOUT", "nothing"),
        pytest.param("TIMEOUT", "its file", marks=pytest.mark.long),
        pytest.param("TIMEOUT", "the disk", marks=pytest.mark.long),
    ],
)
async def test_a_worker_killed_while_it_ends_a_job_has_a_successor_that_knows_why(
    system: System, why: str, spoilt: str
) -> None:
    """Also where the script has removed its own file, or not a byte more can be written."""
    script = TRAPS.format('rm "$0"' if spoilt == "its file" else "")
    job_id = await up(system, script, time_limit=0.05 if why == "TIMEOUT" else None)
    if spoilt == "the disk":
        resource.prlimit(system.worker_pid(), resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    if why == "CANCELLED":
        await system.api.cancel(job_id)
    folder = data_of(system) / f"jobs/{job_id}"

    async def told() -> bool:
        return (folder / "told").exists()

    await until(told, "SIGTERM has arrived")
    kill_worker(system)
    scripts = data_of(system) / "scripts"
    for pid in alive_with(str(scripts / f"job-{job_id}.1")):  # with its folder: tests beside this one have such a job
        os.kill(pid, signal.SIGKILL)  # it ends before the next worker looks
    assert await ended(system, job_id) == (why, None, "KILL")

    async def forgotten() -> bool:
        return not [*scripts.glob("job-*"), *(scripts / ".spool/exits").iterdir()]

    await until(forgotten, "nothing is left of it")


async def test_a_killed_keeper_changes_nothing(system: System) -> None:
    """The launcher ends and is started again, as a service manager would: the old worker turns into a keeper."""
    job_id = await up(system, WAITS + "exit 42")
    worker = system.worker_pid()
    stat = read_stat(worker)
    assert stat is not None
    os.kill(stat.parent, signal.SIGKILL)  # the keeper
    assert await system.children[-1].wait() == 1
    system.start_worker(system.node, 16)

    async def replaced() -> bool:
        return "services.worker.keeper" in cmdline(worker)

    await until(replaced, "the old worker lingers as a keeper")
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 42, None)


async def test_a_killed_launcher_changes_nothing(system: System) -> None:
    """Its keeper has nobody to tell that the worker was replaced, and lingers all the same."""
    job_id = await up(system, WAITS + "exit 43")
    os.kill(system.children[-1].pid, signal.SIGKILL)
    old = system.worker_pid()
    system.start_worker(system.node, 16)

    async def replaced() -> bool:
        return not cmdline(old)

    await until(replaced, "the older worker stops by itself")
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 43, None)


async def test_a_worker_that_leaves_no_job_leaves_no_zombie(system: System) -> None:
    worker = read_stat(system.worker_pid())
    assert worker is not None
    keeper = worker.parent
    system.children[-1].process.send_signal(signal.SIGTERM)
    assert await system.children[-1].wait() == 0
    assert read_stat(keeper) is None


async def test_keeper_and_worker_killed_together_end_the_job_once_nothing_is_left_of_it(system: System) -> None:
    name = uuid4().hex
    job_id = await up(system, WAITS, environment={"TEST_ID": name})
    for pid in alive_with(str(system.folder / system.node)):
        if "services.worker" in cmdline(pid):
            os.kill(pid, signal.SIGKILL)
    await system.children[-1].wait()
    system.start_worker(system.node, 16)

    let_go(system, job_id)  # perhaps before it is adopted: its exit code is lost either way
    job = await system.api.wait(job_id, timeout_seconds=60)
    assert (job["state"], job["state_reason"], job["exit_code"]) == ("NODE_FAIL", "SystemFailure", None)
    assert not alive_with(name)
    assert (await system.api.logs(job_id)).count(b"up") == 1  # never a silent second run


async def test_a_worker_that_is_replaced_hands_its_jobs_over(system: System) -> None:
    """Two workers of one node and spool: the newer wins, the older stops by itself, its jobs go on under the newer."""
    job_id = await up(system, WAITS + "exit 9")
    first = system.children[-1]
    system.start_worker(system.node, 16)
    assert await first.wait() == 3
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 9, None)


async def test_another_spool_is_refused_while_the_lease_lives(system: System) -> None:
    other = system.start("worker", "other", DATA_DIR=str(system.folder / "elsewhere"))
    assert await other.wait() == 3
    assert f"NODE_NAME={system.node} is held by a worker on" in (system.folder / "other.err").read_text()
    assert (await system.run("#!/bin/bash\nexit 5"))["exit_code"] == 5


async def test_a_node_taken_over_with_another_spool_runs_nothing_again(system: System) -> None:
    """The first worker is gone: one with another SCRIPT_DIR is refused while its job goes on, then calls it lost."""
    job_id = await up(system, WAITS)
    system.children[-1].process.send_signal(signal.SIGTERM)
    await system.children[-1].wait()
    refused = system.start("worker", "refused", DATA_DIR=str(system.folder / "elsewhere"))
    assert await refused.wait() == 2
    said = (system.folder / "refused.err").read_text()
    assert f"NODE_NAME={system.node}: job {job_id} of this node runs here (process " in said
    assert (await system.api.job(job_id))["state"] == "RUNNING"
    let_go(system, job_id)
    await until(lambda: gone(system, job_id), "the script has ended")
    system.start("worker", "other", DATA_DIR=str(system.folder / "elsewhere"))
    job = await system.api.wait(job_id, timeout_seconds=60)
    assert (job["state"], job["state_reason"], job["attempt"]) == ("NODE_FAIL", "SystemFailure", 1)
    assert (data_of(system) / f"jobs/{job_id}/slurm-{job_id}.out").read_text().count("up") == 1
    assert not list((system.folder / "elsewhere").glob("jobs/*"))


async def test_what_runs_on_though_its_node_was_declared_down_keeps_another_spool_out(system: System) -> None:
    """Nothing of it is in the tables any more; the worker that knows of it was stopped, and would end it."""
    job_id = await up(system, WAITS)
    system.children[-1].process.send_signal(signal.SIGTERM)
    await system.children[-1].wait()
    await system.api.set_node_state(system.node, "DOWN", "for a test")
    assert (await system.api.job(job_id))["state"] == "NODE_FAIL"
    refused = system.start("worker", "refused", DATA_DIR=str(system.folder / "elsewhere"))
    async with asyncio.timeout(60):  # one that is let in does not end
        assert await refused.wait() == 2
    said = (system.folder / "refused.err").read_text()
    assert f"NODE_NAME={system.node}: job {job_id} of this node runs here (process " in said
    system.start_worker(system.node, 16)
    await until(lambda: gone(system, job_id), "a worker of its own spool ends it")


async def gone(system: System, job_id: int) -> bool:
    """Whether no process runs the script of a job."""
    return not alive_with(str(data_of(system) / f"scripts/job-{job_id}.1"))


async def test_a_script_that_takes_off_its_tag_is_not_run_twice(system: System) -> None:
    job_id = await up(system, WAITS.replace("echo up", "ulimit -S -x unlimited; echo up") + "exit 3\n")
    kill_worker(system)
    await adopted(system)
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 3, None)
    assert (await system.api.logs(job_id)).count(b"up") == 1


async def test_a_script_that_takes_off_all_that_it_bears_is_known_by_its_process(system: System) -> None:
    waits = "'while [ ! -e go ]; do sleep 0.02; done; exit 3'"
    hides = f"#!/bin/bash\necho up\nulimit -S -x unlimited\nexec env -i bash -c {waits}\n"
    job_id = await up(system, hides)
    kill_worker(system)
    await adopted(system)
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 3, None)
    assert (await system.api.logs(job_id)).count(b"up") == 1


@pytest.mark.parametrize("file", ['touch "$0"', 'rm "$0"'])
async def test_a_script_that_hides_in_every_way_and_lives_is_not_run_twice(system: System, file: str) -> None:
    waits = "'while [ ! -e go ]; do sleep 0.02; done'"
    job_id = await up(system, f"#!/bin/bash\n{HIDES}{file}; echo up\nexec env -i bash -c {waits}\n")
    try:
        kill_worker(system)
        assert (await ended(system, job_id))[0] == "NODE_FAIL"
        assert (await system.api.logs(job_id)).count(b"up") == 1
    finally:
        let_go(system, job_id)


@pytest.mark.parametrize("file", ['touch "$0"', 'rm "$0"'])
async def test_a_script_that_hid_in_every_way_and_ended_with_no_worker_there_is_not_run_twice(
    system: System, file: str
) -> None:
    """Its keeper saw that some script ended, and not which: nothing proves that this one was never started."""
    job_id = await up(system, WAITS.replace("echo up", f"{HIDES}{file}; echo up"))
    kill_worker(system)
    let_go(system, job_id)  # long before the next worker is there
    assert (await ended(system, job_id))[0] == "NODE_FAIL"
    assert (await system.api.logs(job_id)).count(b"up") == 1


async def test_two_nodes_need_two_spools(system: System) -> None:
    other = system.start("worker", "other", NODE_NAME="other", DATA_DIR=str(data_of(system)))
    assert await other.wait() == 2
    assert f"is in use by the worker of node {system.node}" in (system.folder / "other.err").read_text()


async def test_what_a_node_left_running_is_not_another_nodes_to_end(system: System) -> None:
    """Its host was renamed, say. Once nothing of it is left, the spool becomes the other's."""
    job_id = await up(system, WAITS + "exit 41")
    system.children[-1].process.send_signal(signal.SIGTERM)
    await system.children[-1].wait()
    renamed = f"{system.node}-renamed"
    other = system.start("worker", "other", NODE_NAME=renamed, DATA_DIR=str(data_of(system)))
    async with asyncio.timeout(60):  # one that is let in does not end
        assert await other.wait() == 2
    said = (system.folder / "other.err").read_text()
    assert f"holds scripts of node {system.node}, which may still run: NODE_NAME={renamed} needs" in said
    assert f"or should be {system.node}" in said
    assert "Traceback" not in said
    system.start_worker(system.node, 16)
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 41, None)
    assert (await system.api.job(job_id))["attempt"] == 1
    assert (await system.api.logs(job_id)).count(b"up") == 1
    system.children[-1].process.send_signal(signal.SIGTERM)
    await system.children[-1].wait()
    system.start("worker", "other", NODE_NAME=renamed, DATA_DIR=str(data_of(system)))
    await system.node_is(renamed)


HOLDS = """
import os, sys
from pathlib import Path
from services.worker.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.open()
print(spool.lock("n1", os.getppid(), 1), flush=True)
sys.stdin.read()
"""


async def test_two_nodes_that_passed_the_check_together_do_not_kill_each_other(tmp_path: Path) -> None:
    spool, pipe = Spool(tmp_path / "scripts"), asyncio.subprocess.PIPE
    first = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDS, str(spool.script_dir), stdin=pipe, stdout=pipe, cwd=ROOT
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert await first.stdout.readline() == b"1\n"
    with pytest.raises(SettingsError, match=r"in use by the worker of node n1: .*; NODE_NAME=n2"):
        await hold_spool(spool, "n2", 7, -1)
    script = spool.script_dir / "job-7.1"
    script.touch()
    first.stdin.close()
    assert await first.wait() == 0
    with pytest.raises(SettingsError, match=r"holds scripts of node n1, .* NODE_NAME=n2 needs .*, or should be n1"):
        await hold_spool(spool, "n2", 7, -1)
    script.unlink()
    assert await hold_spool(spool, "n2", 7, -1) == 7
    script.touch()
    assert spool.node_of_scripts() == "n2"


async def test_a_frozen_worker_is_replaced_for_good(system: System) -> None:
    job_id = await up(system, WAITS + "exit 8")
    first = system.children[-1]
    os.kill(system.worker_pid(), signal.SIGSTOP)
    system.start_worker(system.node, 16)
    assert await first.wait() == 3
    let_go(system, job_id)
    assert await ended(system, job_id) == ("FAILED", 8, None)


async def test_end_jobs_ends_them_with_their_grace(servers: System, tmp_path: Path) -> None:
    ending = {"end_jobs": True, "kill_grace_seconds": 20.0}
    async with beside(servers, tmp_path, {tmp_path.name: 4}, **ending) as system:
        job_id = await up(system, "#!/bin/bash\ntrap 'exit 6' TERM\necho up\nwhile :; do sleep 0.02; done")
        again = await up(system, "#!/bin/bash\necho up\nsleep 1000", requeue=True)
        system.children[-1].process.send_signal(signal.SIGTERM)
        assert await system.children[-1].wait() == 0
        job = await system.api.job(job_id)
        assert (job["state"], job["exit_code"], job["state_reason"]) == ("NODE_FAIL", 6, "SystemFailure")
        requeued = await system.api.job(again)
        assert (requeued["state"], requeued["restart_cnt"], requeued["nodes"]) == ("PENDING", 1, [])
        await asyncio.gather(*(system.api.cancel(requeued["job_id"]) for _ in range(2)))


def test_records_are_whole_or_not_there(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "scripts")
    identity = spool.open()
    assert spool.open() == identity
    assert spool.is_of_this_boot()
    first, second = Leader(5, 40), Leader(5, 41)
    spool.write_record(7, second, -9)
    spool.write_record(7, first, 137)
    assert min(spool.recorded(7)) == first
    assert (spool.record(7, first), spool.record(7, second)) == (Exit(137, None), Exit(None, "KILL"))
    assert spool.recorded_tags() == {7}
    spool.remove_records(7)
    assert spool.record(7, first) is None
    (spool.folder / "keepers/1-1").touch()
    mine = spool.add_keeper(os.getpid())
    assert (spool.keeps(os.getpid()), spool.keeps(1)) == (True, False)
    spool.forget_dead()
    assert [path.name for path in (spool.folder / "keepers").iterdir()] == [mine.name]
    mine.unlink()
    (spool.folder / "boot").write_text("another")
    assert not spool.is_of_this_boot()
    spool.write_record(8, first, 0)
    spool.begin_boot()
    assert spool.is_of_this_boot()
    assert not spool.recorded_tags()
    assert not spool.keeps(1)
