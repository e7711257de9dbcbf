"""The `rowlock` command: light, one line for whatever is wrong, and the exit codes that scripts go by."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from core import machine
from core import role as roles
from core.db import schema
from core.db.connection import connect
from core.settings import Settings
from services.api.serving import serve
from services.cli import commands, health
from services.standalone.stack import SERVERS_FILE, _command, claim, exported, free_port
from tests.builders import a_node, register
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60
HEAVY = ("aiohttp", "asyncpg", "asyncio", "hiredis", "pydantic", "pydantic_settings", "redis", "structlog", "uvloop")
PASSWORD = "open-sesame"  # noqa: S105


def environment(**more: str) -> dict[str, str]:
    """Nothing of the developer's own settings."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def rowlock(*arguments: str, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command as a process of its own."""
    command = (sys.executable, "-m", "services.cli", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=environment(**env))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings, in a directory without a settings file."""
    for name in [*Settings.model_fields, "worker_concurrency"]:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def ours(clean: pytest.MonkeyPatch, settings: Settings) -> pytest.MonkeyPatch:
    """The test's settings, as an environment."""
    for name, value in exported(settings).items():
        clean.setenv(name, value)
    return clean


async def run(*arguments: str) -> int:
    """The command in this process: on a thread, since it brings an event loop of its own."""
    return await asyncio.to_thread(commands.run, list(arguments))


# What it costs, and what it says of itself.


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    script = f"""
import sys
from services.cli.__main__ import main
try:
    main(["--help"])
finally:
    print("heavy:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        (sys.executable, "-c", script), capture_output=True, text=True, timeout=PATIENCE, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line[4] != " "}
    assert listed >= {"demo", "up", "api", "scheduler", "worker", "migrate", "audit", "doctor", "health", "infra"}


def test_what_stays_beside_a_worker_imports_nothing_heavy() -> None:
    """Its launcher and its keeper live as long as it does, on every node."""
    script = f"import services.worker.__main__, sys; print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "heavy: []\n", done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split()[0] == "rowlock"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["up", "--port", "65536"], ["up", "more"], ["health", "redis"]]
)
def test_a_wrong_command_line_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.run(arguments)
    assert ended.value.code == 2
    assert "rowlock" in capsys.readouterr().err


@pytest.mark.parametrize("role", commands.ROLES)
def test_what_follows_a_role_is_left_to_the_role(role: str) -> None:
    options, rest = commands.parse([role, "--config", "x", "--help"])
    assert (options.command, rest) == (role, ["--config", "x", "--help"])


@pytest.mark.parametrize("role", commands.ROLES)
def test_the_stack_starts_a_role_so_that_ps_shows_it(role: str) -> None:
    python, *words, last = _command(role)
    assert (python, last) == (sys.executable, role)
    assert words[0].endswith("/rowlock") or words == ["-m", "services.cli"]


def test_another_platform_is_told_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert commands.run(["audit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Rowlock runs on Linux, x86-64 or arm64; this is darwin")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "fits"), [(("glibc", "2.28"), True), (("glibc", "2.27"), False), (("", ""), False)]
)
def test_the_oldest_glibc(library: tuple[str, str], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: library)
    assert (machine.unsupported() is None) is fits


@pytest.mark.parametrize(
    ("release", "fits"),
    [
        ("5.4", True),
        ("5.4-rc1", True),
        ("5.10.0-8-amd64", True),
        ("6.1.0+", True),
        ("5.3.18-150300", False),
        ("4.19.0", False),
    ],
)
def test_the_oldest_kernel(release: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "release", lambda: release)
    problem = machine.unsupported()
    assert problem == (None if fits else f"Rowlock runs on Linux 5.4 or later; this is {release}.")


def test_an_interrupt_before_a_role_is_up_is_no_traceback(clean: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    clean.setattr(roles, "read_settings", interrupt)
    assert roles.run("api", serve, asyncio.new_event_loop, []) == roles.EXIT_INTERRUPTED


def test_a_bug_is_one_line_with_its_place(clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clean.setattr(roles, "read_settings", lambda given: {}["missing"])
    assert commands.run(["audit"]) == 1
    error = capsys.readouterr().err
    assert "KeyError: 'missing' (test_cli.py:" in error
    assert error.count("\n") == 1


# Settings.


@pytest.mark.parametrize("command", [["audit"], ["api"]])
def test_a_bad_setting_is_one_line_naming_key_and_value(command: list[str], tmp_path: Path) -> None:
    done = rowlock(*command, cwd=tmp_path, API_PORT="http")
    assert done.returncode == 2
    assert done.stderr.startswith("API_PORT=http: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_settings_file_that_is_not_there(clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["audit", "--config", "nowhere"]) == 2
    assert capsys.readouterr().err == "--config: there is no file nowhere\n"


@pytest.mark.parametrize("content", [b"LOG_LEVEL=\xff\n", b"DATABASE_URL=" + PASSWORD.encode() + b"\n"])
def test_a_bad_settings_file(
    content: bytes, clean: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(content)
    assert commands.run(["migrate", "--config", "bad"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert PASSWORD not in error


@pytest.mark.parametrize("command", [["audit"], ["migrate"], ["health", "worker"], ["health", "scheduler"]])
def test_a_server_that_is_away_is_named_without_the_password(
    command: list[str], clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    clean.setenv("POSTGRES_HOST", "127.0.0.1")
    clean.setenv("POSTGRES_PORT", str(port))
    clean.setenv("POSTGRES_PASSWORD", PASSWORD)
    assert commands.run(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"127.0.0.1:{port}" in printed.err
    assert PASSWORD not in printed.err


def test_a_setting_that_is_gone_warns_once(tmp_path: Path) -> None:
    # The address is refused after the role has begun, so it ends by itself.
    done = rowlock("api", cwd=tmp_path, API_HOST="192.0.2.1", WORKER_CONCURRENCY="4", REDIS_PASSWORD=PASSWORD)
    assert done.returncode == 2
    assert done.stderr.count("WORKER_CONCURRENCY is gone") == 1
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stderr


def test_up_warns_once_and_refuses_a_directory_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with claim(folder, 8123):
        done = rowlock("up", "--data-dir", str(folder), "--port", "0", cwd=tmp_path, WORKER_CONCURRENCY="4")
    assert done.returncode == 1
    warning, refusal = done.stderr.splitlines()
    assert "WORKER_CONCURRENCY is gone" in warning
    assert refusal == f"rowlock up: {folder} is in use: rowlock up, pid {os.getpid()}, port 8123"


# migrate.


@pytest.fixture
async def empty_database(databases: Databases, clean: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """A database with nothing in it, which the settings name."""
    name = f"rowlock_empty_{os.getpid()}"
    await databases.execute(f'CREATE DATABASE "{name}"')
    clean.setenv("DATABASE_URL", databases.url_of(name))
    yield databases.url_of(name)
    await databases.drop(name)


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def test_migrate_applies_the_schema_once(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("audit") == 1
    assert capsys.readouterr().err == (
        f"rowlock audit: the database holds schema none, this Rowlock needs {schema.VERSION}: run `rowlock migrate`\n"
    )
    assert await run("migrate") == 0
    assert capsys.readouterr().out == f"applied: schema {schema.VERSION}\n"
    assert await run("migrate") == 0
    assert capsys.readouterr().out == f"nothing to do: the database holds schema {schema.VERSION}\n"
    assert await run("audit") == 0


async def test_a_newer_schema_is_one_line(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    await run("migrate")
    await execute(empty_database, "INSERT INTO rowlock_schema (version) VALUES (999)")
    capsys.readouterr()
    for command in ("migrate", "audit"):
        assert await run(command) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"rowlock {command}: the database holds schema 999, ")
        assert error.count("\n") == 1


async def test_a_foreign_schema_is_one_line(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    await execute(empty_database, "CREATE TABLE invoices (number integer)")
    assert await run("migrate") == 1
    error = capsys.readouterr().err
    assert error.startswith("rowlock migrate: the database holds tables that are not Rowlock's")
    assert error.count("\n") == 1


# audit.


async def test_audit_of_a_sound_database(ours: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("audit") == 0
    assert capsys.readouterr().out.startswith("nothing is broken: ")
    assert await run("audit", "--json") == 0
    assert json.loads(capsys.readouterr().out)["broken"] == []


async def test_audit_prints_the_rows_that_break_an_invariant(
    ours: object, connection: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    await register(connection, a_node("n1"))
    await connection.execute("UPDATE nodes SET alloc_cpus = 3")
    try:
        assert await run("audit") == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("BROKEN capacity: ")
        assert lines[1:] == ["  name=n1 alloc_cpus=3 allocated=0"]
        assert await run("audit", "--json") == 1
        (broken,) = json.loads(capsys.readouterr().out)["broken"]
        assert broken["row"] == {"name": "n1", "alloc_cpus": 3, "allocated": 0}
    finally:
        await connection.execute("UPDATE nodes SET alloc_cpus = 0")


# health.


async def test_health_of_a_worker(
    ours: pytest.MonkeyPatch, connection: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    ours.setattr(health.socket, "gethostname", lambda: "here")
    assert await run("health", "worker") == 1
    assert capsys.readouterr().err == "worker: node n1 is not registered\n"
    await register(connection, a_node("n1", hostname="elsewhere"))
    assert await run("health", "worker") == 1
    assert capsys.readouterr().err == "worker: node n1 is held by a worker on elsewhere, this is here\n"
    await connection.execute("UPDATE node_leases SET hostname = 'here'")
    assert await run("health", "worker") == 0
    assert capsys.readouterr().out.count("\n") == 1
    await connection.execute("UPDATE node_leases SET lease_until = clock_timestamp()")
    assert await run("health", "worker") == 1
    assert capsys.readouterr().err == "worker: node n1: its lease is over\n"


async def test_health_of_a_scheduler(
    ours: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run("health", "scheduler") == 1
    assert capsys.readouterr().err == "scheduler: no scheduler of this host is connected to PostgreSQL\n"
    scheduler = await connect(settings, "scheduler")
    try:
        assert await run("health", "scheduler") == 0
        assert capsys.readouterr().out.count("\n") == 1
        ours.setattr(health, "SILENT_SECONDS", -1)
        assert await run("health", "scheduler") == 1
        assert "has been silent for" in capsys.readouterr().err
    finally:
        await scheduler.close()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    api = asyncio.ensure_future(serve(settings, stop))
    try:
        yield
    finally:
        stop.set()
        await api


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])  # noqa: S104
async def test_health_of_an_api(
    host: str, ours: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    ours.setenv("API_HOST", host)
    ours.setenv("API_PORT", str(port))
    assert await run("health", "api") == 1
    assert "cannot be reached" in capsys.readouterr().err
    async with serving(settings.model_copy(update={"api_host": host, "api_port": port, "auth": "none"})):
        for _ in range(PATIENCE * 10):
            if await run("health", "api") == 0:
                break
            await asyncio.sleep(0.1)
        assert str(port) in capsys.readouterr().out


async def test_health_of_an_api_whose_database_is_away(
    ours: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    ours.setenv("API_PORT", str(port))
    away = {"database_url": None, "postgres_host": "127.0.0.1", "postgres_port": free_port(), "api_port": port}
    async with serving(settings.model_copy(update=away)):
        assert await run("health", "api") == 1
    error = capsys.readouterr().err
    assert error.startswith("api: ")
    assert error.count("\n") == 1


# infra.


async def test_infra_leads_roles_to_its_servers_and_leaves_no_address_behind(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    file = folder / SERVERS_FILE
    infra = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "infra", "--data-dir", str(folder)),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(),
    )
    try:
        async with asyncio.timeout(PATIENCE):
            await said(infra, f"--config {file}")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        migrated = rowlock("migrate", "--config", str(file), cwd=tmp_path)
        assert (migrated.returncode, migrated.stdout) == (0, f"applied: schema {schema.VERSION}\n")
        second = rowlock("infra", "--data-dir", str(folder), cwd=tmp_path)
        assert second.returncode == 1
        assert second.stderr == f"rowlock infra: {folder} is in use: rowlock infra, pid {infra.pid}\n"
    finally:
        infra.send_signal(signal.SIGINT)
        await infra.communicate()
    assert infra.returncode == 0
    assert not file.exists()
    assert not (folder / "postgres" / "postmaster.pid").exists()


async def said(process: asyncio.subprocess.Process, words: str) -> None:
    """Read what a process prints until it has said so."""
    assert process.stdout is not None
    while words not in (line := (await process.stdout.readline()).decode()):
        assert line, "it ended"
