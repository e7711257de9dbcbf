"""End to end over HTTP, every role a real process."""

import asyncio
import json
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio

from core.client import Client, ClientError
from core.db.audit import audit
from core.settings import Settings
from services.api.watch import SETTLING_SECONDS
from tests.builders import settings_for
from tests.conftest import Databases
from tests.system import LEDGER_SCRIPT, System, alive_with, beside, most_held, read_ledger, running, text_of, until

pytestmark = pytest.mark.anyio

GUIDE_JOB = {"name": "migration-test", "account": "test", "cpus_per_task": 1, "ntasks_per_node": 1}
GUIDE_SCRIPT = "#!/bin/bash\necho Migration successful!\nsleep 5"


@pytest.fixture(scope="module")
async def a_system(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    folder = tmp_path_factory.mktemp("system")
    async with databases.one() as url, running(settings_for(url, redis_url, folder), folder) as found:
        yield found


@pytest.fixture
async def system(a_system: System) -> AsyncIterator[System]:
    """The system, with nothing to do; whatever the test did, nothing is left of it and no invariant is broken."""
    yield a_system
    await a_system.clear()
    connection = await asyncpg.connect(a_system.settings.postgres_dsn)
    try:
        assert await audit(connection) == []
    finally:
        await connection.close()


def events(path: Path, job_id: int) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("job_id") == job_id]


async def test_the_guides_job(system: System) -> None:
    script = GUIDE_SCRIPT.replace("sleep 5", "sleep 0.2")
    submitted = await system.api.submit(GUIDE_JOB, script)
    assert submitted["state"] == "PENDING"
    job = await system.api.wait(submitted["job_id"])
    assert (job["state"], job["exit_code"], job["signal"], job["state_reason"]) == ("COMPLETED", 0, None, "None")
    assert await system.api.logs(job["job_id"]) == b"Migration successful!\n"
    assert await system.api.script(job["job_id"]) == script
    assert await system.cpus_in_use() == 0
    logs = system.settings.log_dir

    async def told() -> bool:
        return [len(events(logs / f"{role}.log", job["job_id"])) for role in ("scheduler", "worker")] == [1, 3]

    await until(told, "the story of the job")
    [allocated] = events(logs / "scheduler.log", job["job_id"])
    assert (allocated["event"], allocated["node"], allocated["cpus"]) == ("job_allocated", "n1", 1)
    story = events(logs / "worker.log", job["job_id"])
    assert [e["event"] for e in story] == ["job_started", "job_ended", "job_released"]
    assert (story[1]["state"], story[1]["exit_code"]) == ("COMPLETED", 0)
    [accepted] = events(logs / "api.log", job["job_id"])
    assert accepted["event"] == "job_submitted"
    assert accepted["request_id"]
    assert not list((system.folder / "n1/data/scripts").glob("job-*"))


async def test_an_api_takes_as_many_connections_as_it_may(system: System, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = System(system.settings, tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
        try:
            address = own.start_api()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with Client(address) as api:
            await own.healthy(api)
        assert resource.prlimit(own.children[0].process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        await own.close()


async def test_who_waits_is_told(system: System, tmp_path: Path) -> None:
    """By the worker: the poll of this API comes too late, and so does the end of the request's time."""
    async with beside(system, tmp_path, {"told": 4}) as own, Client(own.start_api("api-2", POLL_SECONDS=300)) as api:
        await own.healthy(api)
        job_id = (await own.submit("#!/bin/sh\nwhile [ ! -e go ]; do sleep 0.05; done\n"))["job_id"]
        asked = asyncio.create_task(text_of(f"{api.address}/api/v1/jobs/{job_id}?wait=60s"))
        await asyncio.sleep(SETTLING_SECONDS + 0.5)  # in which its polls are close together
        await own.run("#!/bin/sh\n")  # the worker reads of it, and learns that somebody listens
        (own.folder / f"told/data/jobs/{job_id}/go").touch()
        assert json.loads(await asyncio.wait_for(asked, 40))["state"] == "COMPLETED"


async def test_an_output_is_followed_as_it_is_written(system: System) -> None:
    script = "#!/bin/sh\necho one\nwhile [ ! -e go ]; do sleep 0.02; done\necho two\n"
    job_id = (await system.submit(script))["job_id"]
    found = system.api.follow(job_id)
    async with asyncio.timeout(40):
        assert await anext(found) == b"one\n"
        (system.folder / f"{system.node}/data/jobs/{job_id}/go").touch()
        assert b"".join([data async for data in found]) == b"two\n"
    assert (await system.api.job(job_id))["state"] == "COMPLETED"


async def test_mixed_jobs_never_hold_more_than_there_is(system: System, tmp_path: Path) -> None:
    """200 jobs through two APIs with two schedulers: what overlaps fits, all is used, each runs once."""
    ledger, cpus, count = tmp_path / "ledger", 8, 200
    luck = random.Random(7)
    sizes = [luck.choice([1, 1, 2, 3, 4, 8]) for _ in range(count)]
    async with beside(system, tmp_path, {"eight": cpus}) as own:
        own.start("scheduler", "scheduler-2")
        async with Client(own.start_api("api-2")) as second:
            await own.healthy(second)

            async def post(number: int) -> int:
                environment = {"LEDGER": str(ledger), "SECONDS_LONG": f"0.{luck.randint(1, 9):02}"}
                job = {"account": "test", "partition": own.partition, "cpus_per_task": sizes[number]}
                api = (own.api, second)[number % 2]
                return (await api.submit({**job, "environment": environment}, LEDGER_SCRIPT))["job_id"]

            job_ids = await asyncio.gather(*map(post, range(count)))
            jobs = [await own.api.wait(job_id) for job_id in job_ids]
        assert {job["state"] for job in jobs} == {"COMPLETED"}
        assert await own.cpus_in_use() == 0
    entries = read_ledger(ledger)
    assert Counter((e.what, e.job_id) for e in entries) == Counter(
        (what, job_id) for job_id in job_ids for what in ("start", "end")
    )
    assert most_held(entries, "eight") == cpus


async def test_ends_as_they_happened(system: System) -> None:
    async def end_of(script: str) -> tuple[object, ...]:
        job = await system.run(f"#!/bin/bash\nulimit -c 0\n{script}\n")
        return job["state"], job["state_reason"], job["exit_code"], job["signal"]

    assert await asyncio.gather(
        *map(end_of, ("exit 0", "exit 137", "exit 1", "kill -9 $$", "kill -SEGV $$", "kill -TERM $$"))
    ) == [
        ("COMPLETED", "None", 0, None),
        ("FAILED", "NonZeroExitCode", 137, None),
        ("FAILED", "NonZeroExitCode", 1, None),
        ("FAILED", "RaisedSignal", None, "KILL"),
        ("FAILED", "RaisedSignal", None, "SEGV"),
        ("FAILED", "RaisedSignal", None, "TERM"),
    ]


async def test_a_time_limit_ends_the_job_with_everything_it_started(system: System) -> None:
    name = uuid4().hex
    script = f"#!/bin/bash\nenv -i setsid bash -c 'exec -a {name} sleep 1000' &\ntrap '' TERM\nsleep 1000 & sleep 1000"
    job = await system.run(script, time_limit=0.02, environment={"TEST_ID": name})
    assert (job["state"], job["state_reason"]) == ("TIMEOUT", "TimeLimit")
    assert (job["exit_code"], job["signal"]) in ((None, "KILL"), (None, "TERM"))
    assert job["time_limit_seconds"] == 2
    assert not alive_with(name)
    assert await system.cpus_in_use() == 0


async def test_cancel_of_a_running_job(system: System) -> None:
    name = uuid4().hex
    script = "#!/bin/bash\ntrap 'echo bye; exit 3' TERM\necho up\nwhile :; do sleep 0.05; done"
    submitted = await system.api.submit({"account": "a", "environment": {"TEST_ID": name}}, script)
    await system.says(submitted["job_id"], b"up")
    first = await system.api.cancel(submitted["job_id"])
    assert (first["state"], first["cancel_requested_time"] is None) in (("RUNNING", False), ("CANCELLED", False))
    job = await system.api.wait(submitted["job_id"])
    assert (job["state"], job["exit_code"], job["signal"]) == ("CANCELLED", 3, None)
    assert (await system.api.logs(job["job_id"])).endswith(b"bye\n")
    assert await system.api.cancel(job["job_id"]) == job
    assert not alive_with(name)


async def test_cancel_of_a_waiting_job_means_that_it_never_starts(system: System) -> None:
    ledger = system.folder / "ledger"
    environment = {"LEDGER": str(ledger), "SECONDS_LONG": "0"}
    blocker = await system.api.submit({"account": "a", "cpus_per_task": 4}, "#!/bin/bash\nsleep 1000")
    await system.state_is(blocker["job_id"], "RUNNING")
    waiting = await system.api.submit({"account": "a", "environment": environment}, LEDGER_SCRIPT)
    assert (await system.api.cancel(waiting["job_id"]))["state"] == "CANCELLED"
    await system.api.cancel(blocker["job_id"])
    await system.api.wait(blocker["job_id"])
    last = await system.run(LEDGER_SCRIPT, environment=environment)
    assert {entry.job_id for entry in read_ledger(ledger)} == {last["job_id"]}


async def test_a_job_sees_its_own_environment_and_no_secret(system: System) -> None:
    job = await system.run(
        "#!/bin/bash\nenv -0 | sort -z | tr '\\0' '\\n'; pwd",
        name="env",
        tasks=2,
        cpus_per_task=2,
        memory_per_node="1G",
        time_limit=5,
        environment={"MINE": "1", "LANG": "de"},
    )
    lines = (await system.api.logs(job["job_id"])).decode().splitlines()
    variables = dict(line.split("=", 1) for line in lines[:-1])
    assert lines[-1] == job["current_working_directory"] == str(system.folder / f"n1/data/jobs/{job['job_id']}")
    expected = {
        "MINE": "1", "LANG": "de", "SLURM_JOB_ID": str(job["job_id"]), "SLURM_JOB_NAME": "env", "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_NODE": "1024", "SLURMD_NODENAME": "n1",
        "SLURM_JOB_NODELIST": "n1", "ENVIRONMENT": "BATCH",
    }  # fmt: skip
    assert {key: variables.get(key) for key in expected} == expected
    assert not {"DATABASE_URL", "REDIS_URL", "PYTHONPATH"} & variables.keys()
    assert int(variables["SLURM_JOB_END_TIME"]) - int(variables["SLURM_JOB_START_TIME"]) == 300


async def test_scripts_that_cannot_be_started(system: System) -> None:
    (system.folder / "n1/data/jobs/link").symlink_to("/")
    cases: list[tuple[str, dict[str, str], str]] = [
        ("#!/no/such/shell\n", {}, "/no/such/shell does not exist"),
        ("#!bash\n", {}, "absolute path"),
        ("#!/bin/bash\n", {"current_working_directory": "link"}, "symbolic link"),
        ("#!/bin/bash\n", {"standard_output": "a/../../x"}, ""),
    ]
    for script, job, why in cases[:3]:
        ended = await system.run(script, **job)
        assert (ended["state"], ended["state_reason"]) == ("FAILED", "JobLaunchFailure")
        assert (ended["exit_code"], ended["signal"]) == (None, None)
        assert why in (ended["state_description"] or "")
    with pytest.raises(ClientError, match=r"\.\."):
        await system.run(cases[3][0], **cases[3][1])
    assert await system.cpus_in_use() == 0
    assert (await system.run("#!/bin/bash\n"))["state"] == "COMPLETED"


async def test_output_of_both_streams_while_it_runs(system: System) -> None:
    script = "#!/bin/bash\necho out; echo err >&2\nwhile [ ! -e go ]; do sleep 0.02; done\nhead -c 3000000 /dev/zero"
    submitted = await system.api.submit(
        {"account": "a", "name": "x", "standard_output": "o/%x-%j.out", "standard_error": "e-%4j"}, script
    )
    job_id = submitted["job_id"]
    await system.says(job_id, b"out")
    assert await system.api.logs(job_id) == b"out\n"
    assert await system.api.logs(job_id, "stderr") == b"err\n"
    folder = system.folder / f"n1/data/jobs/{job_id}"
    (folder / "go").touch()
    job = await system.api.wait(job_id)
    assert await system.api.logs(job_id) == b"out\n" + bytes(3_000_000)
    assert await system.api.logs(job_id, offset=3_000_000) == bytes(4)
    assert job["standard_output"] == str(folder / f"o/x-{job_id}.out")
    assert job["standard_error"] == str(folder / f"e-{job_id:04}")


async def test_two_nodes_run_what_fits_and_both_serve_their_output(system: System, tmp_path: Path) -> None:
    async with beside(system, tmp_path, {"small": 1, "large": 3}) as two:

        async def run(cpus: int) -> tuple[list[str], bytes]:
            job = await two.run("#!/bin/bash\necho $SLURMD_NODENAME; sleep 0.2", cpus_per_task=cpus)
            return job["nodes"], await two.api.logs(job["job_id"])

        ends = await asyncio.gather(*map(run, (3, 1, 1, 1, 1)))
        assert ends[0] == (["large"], b"large\n")
        assert {nodes[0] for nodes, _ in ends} == {"small", "large"}
        assert all(output == f"{nodes[0]}\n".encode() for nodes, output in ends)
        with pytest.raises(ClientError, match="has 3"):
            await two.submit("#!/bin/bash\n", cpus_per_task=4)


async def test_without_redis_jobs_run_all_the_same(settings: Settings, tmp_path: Path) -> None:
    away = settings.model_copy(update={"redis_url": None, "redis_host": "127.0.0.1", "redis_port": 9})
    async with running(away, tmp_path) as system:
        assert (await system.run("#!/bin/bash\nexit 7"))["exit_code"] == 7
        job = await system.api.submit({"account": "a"}, "#!/bin/bash\nsleep 1000")
        await system.state_is(job["job_id"], "RUNNING")
        await system.api.cancel(job["job_id"])
        assert (await system.api.wait(job["job_id"]))["state"] == "CANCELLED"


async def test_an_emptied_redis_costs_no_job(system: System) -> None:
    client = redis.asyncio.Redis.from_url(system.settings.redis_dsn)
    try:
        job_ids = []
        for number in range(20):
            job_ids.append((await system.api.submit({"account": "a"}, f"#!/bin/bash\nexit {number}"))["job_id"])
            if number % 5 == 0:
                await client.delete("rowlock:node:n1")
    finally:
        await client.aclose()
    assert [(await system.api.wait(job_id))["exit_code"] for job_id in job_ids] == list(range(20))


async def test_a_node_whose_worker_is_gone_is_down_and_given_nothing(system: System, tmp_path: Path) -> None:
    async with beside(system, tmp_path, {"gone": 4}, heartbeat_seconds=0.2, lease_seconds=1.0) as own:
        for pid in alive_with(str(own.folder / "gone")):
            os.kill(pid, signal.SIGKILL)
        await own.node_is("gone", "DOWN")
        job = await own.submit("#!/bin/bash\nexit 4")
        assert (await own.api.job(job["job_id"]))["state"] == "PENDING"
        own.start_worker("gone")
        assert (await own.api.wait(job["job_id"]))["exit_code"] == 4


async def test_a_node_that_was_full_works_on_without_a_scheduler(settings: Settings, tmp_path: Path) -> None:
    """Each end gives its CPUs to what waits next."""
    go = tmp_path / "go"
    script = '#!/bin/bash\nwhile [ ! -e "$GO" ]; do sleep 0.02; done'
    async with running(settings, tmp_path) as system:
        sizes = [1, 1, 2, *[1, 2, 4] * 4]
        jobs = [
            await system.submit(script, cpus_per_task=size, environment={"GO": str(go)}, name=f"of {size}")
            for size in sizes
        ]
        for job in jobs[:3]:
            await system.state_is(job["job_id"], "RUNNING")
        [scheduler] = [child for child in system.children if child.name == "scheduler"]
        scheduler.process.kill()
        await scheduler.wait()
        go.touch()
        ended = [await system.api.wait(job["job_id"]) for job in jobs]
        assert {job["state"] for job in ended} == {"COMPLETED"}
        assert await system.cpus_in_use() == 0

        async def told() -> list[list[object]] | None:
            stories = [events(settings.log_dir / "worker.log", job["job_id"]) for job in jobs]
            return [[e["event"] for e in s] for s in stories] if all(len(s) >= 3 for s in stories) else None

        stories = await until(told, "the worker's story of each job")
        own = ["job_started", "job_ended", "job_released"]
        assert stories == [own] * len(jobs)


async def test_roles_start_in_any_order_and_wait_for_their_servers(
    databases: object, settings: Settings, tmp_path: Path
) -> None:
    """Everything is started against a port where nothing listens: each says which, and none ends."""
    away = settings.model_copy(
        update={"database_url": None, "postgres_host": "127.0.0.1", "postgres_port": 9, "postgres_user": "u"}
    )
    system = System(away, tmp_path)
    try:
        for role in ("worker", "scheduler", "api"):
            system.start(role, API_PORT=0)
        for role in ("worker", "scheduler", "api"):

            async def said(role: str = role) -> bool:
                path = tmp_path / f"{role}.err"
                return path.exists() and "postgresql://127.0.0.1:9/rowlock" in path.read_text()

            await until(said, f"{role} names the address")
        assert all(child.alive for child in system.children)
    finally:
        await system.close()
    assert [child.process.returncode for child in system.children] == [0, 0, 0]
