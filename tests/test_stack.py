"""The two commands that run everything, end to end: `rowlock demo` and `rowlock up`, as a person types them."""

import asyncio
import os
import re
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from core.client import Client, ClientError
from core.db.audit import audit
from services.standalone.embedded import EmbeddedPostgres
from services.standalone.stack import ROLES, free_port
from tests.system import PATIENCE, ROOT, alive_with, cmdline, until

pytestmark = pytest.mark.anyio

LONG = 2 * PATIENCE
"""Seconds for a whole stack to start or stop: there are three at once, on two cores that others use as well."""


@pytest.fixture
def folder(server_dir: Path) -> Iterator[Path]:
    """Where the tests' servers are, in memory: each stack makes a cluster of its own."""
    found = server_dir / "stack"
    found.mkdir()
    yield found
    shutil.rmtree(found)


@dataclass(slots=True)
class Command:
    """A running `rowlock …`, in a session of its own as under a terminal, and what it says."""

    process: Process
    errors: Path
    lines: list[str] = field(default_factory=list)
    reading: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        """Collect its lines until nothing holds its stdout any more."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip("\n"))

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    async def says(self, pattern: str) -> None:
        """Wait for a line that matches."""

        async def asked() -> bool:
            assert self.process.returncode is None or self.said(pattern), self.story()
            return self.said(pattern)

        await until(asked, f"a line like {pattern!r}", LONG)

    def in_order(self, *patterns: str) -> None:
        """Each pattern has its line, and the lines come in this order."""
        found = [next((at for at, line in enumerate(self.lines) if re.search(p, line)), -1) for p in patterns]
        assert found == sorted(set(found)), f"{found}\n{self.story()}"
        assert -1 not in found, f"{found}\n{self.story()}"

    def interrupt(self) -> None:
        """What Ctrl-C in its terminal does: the whole foreground group gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    async def end(self) -> int:
        """Wait for its end and its last line: the exit code, or minus the signal."""
        async with asyncio.timeout(LONG):
            await self.reading
            return await self.process.wait()

    def story(self) -> str:
        return "\n".join([*self.lines, "--- stderr", self.errors.read_text()])


class Place:
    """A folder to run commands in: their current directory, and in it their TMPDIR."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "t"  # short: the path of a socket must be
        self.tmp.mkdir(parents=True, mode=0o700)

    def left(self) -> list[str]:
        """What is in TMPDIR, and what runs."""
        return [path.name for path in self.tmp.iterdir()] + [f"{pid} {cmdline(pid)}" for pid in self.alive()]

    def alive(self) -> list[int]:
        """Every process that has this folder in its environment or command line, or its current directory in it."""
        return sorted({*alive_with(str(self.folder)), *alive_in(self.folder)})

    async def start(self, stderr: int, *args: str, **env: str) -> Process:
        plain = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", *args),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=stderr,
            env={**plain, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), **env},
            cwd=self.folder,
            start_new_session=True,
        )

    @asynccontextmanager
    async def running(self, *args: str, **env: str) -> AsyncIterator[Command]:
        """`rowlock ARGS`; whatever happens inside, nothing of this place runs afterwards."""
        errors = self.folder / f"{args[0]}.err"
        with errors.open("wb") as stderr:
            process = await self.start(stderr.fileno(), *args, **env)
        command = Command(process, errors)
        try:
            yield command
        finally:
            while left := self.alive():
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.01)
            await process.wait()
            await command.reading

    async def refused(self, *args: str) -> str:
        """`rowlock ARGS` that does not start: its one line."""
        process = await self.start(PIPE, *args)
        async with asyncio.timeout(PATIENCE):
            _, said = await process.communicate()
        assert process.returncode == 1, said.decode()
        assert said.count(b"\n") == 1, said.decode()
        return said.decode()


def alive_in(folder: Path) -> list[int]:
    """Every live process whose current directory lies in this one: PostgreSQL's, which overwrite all else."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if f"{os.readlink(f'/proc/{name}/cwd')}/".startswith(f"{folder}/"):
                found.append(int(name))
    return found


async def becomes(true: Callable[[], object], what: str) -> None:
    """Wait until it is true."""

    async def asked() -> object:
        return true()

    await until(asked, what)


async def watched(place: Place) -> None:
    async with place.running("demo") as demo:
        assert await demo.end() == 0, demo.story()
        assert place.left() == []
    states = [rf"^  \d\d:\d\d:\d\d\.\d\d\d  {state}" for state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETED")]
    demo.in_order("^POST http", *states, r"^node demo: 0 of \d+ CPUs allocated$", "^stopping everything$", "^done: ")
    demo.in_order("CONFIGURING", r"^ +\| Migration successful!$", r"COMPLETED \(exit code 0\)$")
    assert demo.errors.read_text() == ""


async def interrupted(place: Place) -> None:
    async with place.running("demo") as demo:
        await demo.says("RUNNING")
        demo.interrupt()
        assert await demo.end() == 130, demo.story()
        assert place.left() == []
    assert not demo.said("COMPLETED")
    assert demo.errors.read_text() == "rowlock demo: stopped by SIGINT, nothing is left\n"


async def killed(place: Place) -> None:
    async with place.running("demo") as demo:
        await demo.says("RUNNING")
        demo.process.kill()
        assert await demo.end() == -signal.SIGKILL
        await becomes(lambda: not place.left(), "a killed demo leaves neither process nor file")
    assert not demo.said("COMPLETED")


async def test_demo(folder: Path) -> None:
    """Three at once: one goes its way, one gets a Ctrl-C in the middle, one `kill -9`. Nothing is left of any."""
    async with asyncio.TaskGroup() as group:
        for show in (watched, interrupted, killed):
            group.create_task(show(Place(folder / show.__name__[0])))


async def test_up(folder: Path) -> None:
    """Two lives of one stack, and a job that runs from the first into the time between them."""
    place, data, port = Place(folder), folder / "d", free_port()
    args = ("up", "--data-dir", str(data), "--port", str(port))
    async with Client(f"http://127.0.0.1:{port}") as client:
        async with place.running(*args) as up:
            await up.says(f"^ready: http://127.0.0.1:{port} ")
            up.in_order(
                "^settings: ", f"^Redis: embedded, in {data}$", f"^PostgreSQL: embedded, in {data}$", "^ready: "
            )
            await check_refusals(place, data, port, up.process.pid)
            first = await ran(client)
            second = await check_restarts(up, data, client)
            lasting = await spoken(client, "while [ ! -e go ]; do sleep 0.05; done; exit 7")
            up.interrupt()
            assert await up.end() == 0, up.story()
            check_order(up, "^running jobs that go on without us: 1; the next start takes them over$")
            check_what_goes_on(place)
            (data / f"jobs/{lasting}/go").touch()
            await becomes(lambda: not place.alive(), "the job ends, and then its keeper")
            assert list(place.tmp.iterdir()) == []
        async with place.running(*args, "--end-jobs") as up:
            await up.says("^ready: ")
            job = await client.wait(lasting, timeout_seconds=PATIENCE)
            assert (job["state"], job["exit_code"], job["attempt"]) == ("FAILED", 7, 1)
            listed = {job["job_id"]: job["state"] async for job in client.all_jobs()}
            assert listed == {first: "COMPLETED", second: "COMPLETED", lasting: "FAILED"}
            assert await client.logs(first) == f"{first}\n".encode()
            ended = await spoken(client, "sleep 1000")
            up.interrupt()
            assert await up.end() == 0, up.story()
            check_order(up)
            assert place.left() == []
    assert await found_in(data, ended) == ("NODE_FAIL", None, "TERM")


async def test_up_embeds_only_what_is_not_configured(folder: Path, database_url: str, redis_url: str) -> None:
    place, url = Place(folder), urlsplit(database_url)
    secret = url.password or "only-for-the-server"
    netloc = url.netloc if url.password else url.netloc.replace("@", f":{secret}@")
    configured = {"DATABASE_URL": urlunsplit(url._replace(netloc=netloc)), "REDIS_URL": redis_url}
    async with place.running("up", "--port", "0", "--unsafe", **configured) as up:
        await up.says("^ready: ")
        address = up.lines[-1].split()[1]
        async with Client(address) as client:
            await ran(client)
        up.interrupt()
        assert await up.end() == 0, up.story()
        assert place.left() == []
    up.in_order(
        "^Redis: the one configured, ", "^PostgreSQL: the one configured, .*/rowlock_test_", *stops(*ROLES), "^stopped$"
    )
    assert secret not in up.story()
    assert not {"postgres", "redis"} & {path.name for path in (folder / ".rowlock").iterdir()}


async def check_refusals(place: Place, data: Path, port: int, pid: int) -> None:
    same, other = await asyncio.gather(
        place.refused("up", "--data-dir", str(data), "--port", "0"),
        place.refused("up", "--data-dir", str(place.folder / "other"), "--port", str(port)),
    )
    assert same == f"rowlock up: {data} is in use: rowlock up, pid {pid}, port {port}\n"
    assert other == f"rowlock up: port {port} of 127.0.0.1 is taken; choose another with --port\n"


async def check_restarts(up: Command, data: Path, client: Client) -> int:
    """Killed together, as on a machine that is short of memory: two roles and both servers. Then a job runs."""
    shown = {"api": r"rowlock api\s*$", "scheduler": r"rowlock scheduler\s*$"}
    shown |= {"redis": "valkey-server ", "postgres": "bin/postgres -D "}
    for pid in [pid_of(data, pattern) for pattern in shown.values()]:
        os.kill(pid, signal.SIGKILL)
    for name in shown:
        await up.says(f"^{name} was killed by SIGKILL; starting it again in 1 s$")
    job_id = await ran(client)
    assert len([line for line in up.lines if "starting it again" in line]) == len(shown), up.story()
    return job_id


def pid_of(data: Path, pattern: str) -> int:
    """The process that `ps` shows so."""
    [pid] = [pid for pid in alive_with(str(data)) if re.search(pattern, cmdline(pid))]
    return pid


def stops(*names: str) -> list[str]:
    return [f"^stopping {name}$" for name in names]


def check_order(up: Command, *last: str) -> None:
    """The stop told each part in its order, after the roles what goes on without them."""
    up.in_order(*stops(*ROLES), *last, *stops("redis", "postgres"), "^stopped$")
    assert up.said("go on without us") == bool(last), up.story()


def check_what_goes_on(place: Place) -> None:
    """The script and its keeper run, and nothing else."""
    lines = [cmdline(pid) for pid in place.alive()]
    others = [line for line in lines if line and not line.startswith(("/bin/bash ", "sleep "))]
    assert len(others) == 1, others
    assert re.search(r"rowlock worker\s*$", others[0]), others


async def ran(client: Client) -> int:
    """Run a job to its good end, through an API that may be away for a while."""

    async def submitted() -> int | None:
        try:
            return (await client.submit({"account": "a"}, "#!/bin/bash\necho $SLURM_JOB_ID"))["job_id"]
        except ClientError as error:
            if not error.may_pass:
                raise
            return None

    job = await client.wait(await until(submitted, "a job is accepted"), timeout_seconds=PATIENCE)
    assert job["state"] == "COMPLETED", job
    return job["job_id"]


async def spoken(client: Client, script: str) -> int:
    """Submit, and wait until the script itself has said something."""
    job_id = (await client.submit({"account": "a"}, f"#!/bin/bash\necho up\n{script}\n"))["job_id"]

    async def asked() -> bool:
        try:
            return await client.logs(job_id) == b"up\n"
        except ClientError as error:
            if not error.may_pass:
                raise
            return False

    await until(asked, f"job {job_id} speaks")
    return job_id


async def found_in(data: Path, job_id: int) -> tuple[str, int | None, str | None]:
    """How a job ended, from the database alone; no invariant is broken there."""
    async with EmbeddedPostgres(data) as postgres:
        connection = await asyncpg.connect(postgres.url)
        try:
            assert await audit(connection) == []
            row = await connection.fetchrow("SELECT state, exit_code, signal FROM jobs WHERE job_id = $1", job_id)
            assert row is not None
            return tuple(row)
        finally:
            await connection.close()
