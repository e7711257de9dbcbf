"""`rowlock doctor`: each judgement by its values, and one look at what is really there, which changes nothing."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from core import streams
from core.db import nodes, schema
from core.errors import SchemaMismatch
from core.settings import Settings
from services.api import database as api
from services.cli.doctor import command, folders, node, postgres, redis
from services.cli.doctor.finding import Finding, fault, ok
from services.cli.doctor.mounts import mount_of, mounts, read_mounts
from services.scheduler import serve as scheduler
from services.standalone.stack import free_port
from services.worker import node as worker
from services.worker import proc
from tests.builders import a_node, register
from tests.proxy import Fault, Proxy, proxied

pytestmark = pytest.mark.anyio

GIB = folders.GIB


def said(findings: list[Finding] | Finding, what: str) -> tuple[str, str]:
    """The verdict and the detail on one thing."""
    listed = findings if isinstance(findings, list) else [findings]
    (found,) = [finding for finding in listed if finding.what == what]
    return found.verdict, found.detail


# The node

NODE = node.Node(
    release="6.1.0-18-amd64",
    pidfds=True,
    subreaper=True,
    lists_children=True,
    tags=True,
    hidepid="0",
    cgroup="cgroup v2 is delegated",
    user="rowlock",
    is_root=False,
)


@pytest.mark.parametrize(
    ("changes", "what", "verdict", "detail"),
    [
        ({}, "kernel", "ok", "6.1.0-18-amd64"),
        ({"pidfds": False}, "kernel", "fault", "pidfd_open is refused"),
        ({}, "children", "ok", ""),
        ({"lists_children": False}, "children", "warning", "all of /proc is read"),
        ({}, "hard limit of locks", "ok", "unlimited"),
        ({"tags": False}, "hard limit of locks", "fault", "no worker starts"),
        ({}, "hidepid", "ok", ""),
        ({"hidepid": "2"}, "hidepid", "warning", "hidepid=2"),
        ({"hidepid": "2", "is_root": True}, "hidepid", "ok", ""),
        ({}, "containment", "ok", "cgroup v2 is delegated, and not used"),
        ({"cgroup": "there is no cgroup v2"}, "containment", "ok", "there is no cgroup v2"),
        ({"subreaper": False}, "containment", "fault", "no subreapers"),
        ({}, "isolation", "warning", "here rowlock"),
    ],
)
def test_a_node(changes: dict[str, Any], what: str, verdict: str, detail: str) -> None:
    found = said(node.judge(replace(NODE, **changes)), what)
    assert found[0] == verdict
    assert detail in found[1]


def test_this_node_is_seen_as_the_worker_sees_it() -> None:
    seen = node.look()
    assert (seen.release, seen.is_root) == (os.uname().release, os.geteuid() == 0)
    assert seen.lists_children == proc._lists_children()
    assert node._RLIMIT_LOCKS == proc.TAG_LIMIT


MOUNTS = """\
22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw,hidepid=2
27 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro
30 27 8:2 / /srv rw,noexec - xfs /dev/sdb1 rw
31 30 0:50 / /srv/with\\040blank rw - nfs4 server:/export rw,vers=4.2
32 30 0:51 / /srv/a rw - tmpfs tmpfs rw
33 30 0:52 / /srv/a rw master:1 propagate_from:2 - fuse.sshfs me@there:/ rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srvx", "ext4"),
        ("/srv", "xfs"),
        ("/srv/b/c", "xfs"),
        ("/srv/with blank/x", "nfs4"),
        ("/srv/a/b", "fuse.sshfs"),
    ],
)
def test_a_path_lies_on_the_last_mount_over_it(path: str, kind: str) -> None:
    mount = mount_of(Path(path), read_mounts(MOUNTS))
    assert mount is not None
    assert mount.kind == kind


def test_options_of_a_mount() -> None:
    found = read_mounts(MOUNTS)
    assert node.hidepid(found) == "2"
    assert node.hidepid(found[1:]) == "0"
    assert found[2].options == {"rw", "noexec"}
    assert mount_of(Path("/proc/self"), mounts()) is not None


# Folders

SCRIPTS = folders.Folder(
    name=folders.SCRIPTS,
    path="/srv/scripts",
    exists=True,
    is_folder=True,
    owner="rowlock",
    ours=True,
    mode=0o700,
    writable=True,
    kind="ext4",
    noexec=False,
    free_bytes=20 * GIB,
    free_files=1_000_000,
)
JOBS = replace(SCRIPTS, name=folders.JOBS, path="/srv/jobs", mode=0o755)


@pytest.mark.parametrize(
    ("folder", "verdict", "detail"),
    [
        (SCRIPTS, "ok", "/srv/scripts: rowlock's, mode 0700, ext4, 20.0 GiB free"),
        (replace(SCRIPTS, noexec=True), "ok", "noexec, which is fine"),
        (replace(SCRIPTS, exists=False), "ok", "not there yet, and can be made"),
        (replace(SCRIPTS, exists=False, mode=0o777), "ok", "not there yet"),
        (replace(SCRIPTS, free_files=None), "ok", "/srv/scripts"),
        (replace(SCRIPTS, is_folder=False), "fault", "is no folder"),
        (replace(SCRIPTS, writable=False), "fault", "cannot be written to"),
        (replace(SCRIPTS, writable=False, exists=False), "fault", "cannot be made"),
        (replace(SCRIPTS, mode=0o720), "fault", "mode 0720: others may change the scripts"),
        (replace(SCRIPTS, mode=0o1777), "fault", "mode 1777: others may change the scripts"),
        (replace(SCRIPTS, mode=0o755), "ok", "mode 0755"),
        (replace(SCRIPTS, ours=False, owner="root"), "warning", "belongs to root"),
        (replace(SCRIPTS, kind="nfs4"), "warning", "is on nfs4: the lock"),
        (replace(SCRIPTS, kind="fuse.sshfs"), "warning", "is on fuse.sshfs: the lock"),
        (replace(SCRIPTS, free_bytes=GIB // 2), "warning", "0.5 GiB"),
        (replace(SCRIPTS, free_bytes=GIB // 100), "fault", "jobs cannot start"),
        (replace(SCRIPTS, free_files=10_000), "warning", "10000 files left"),
        (replace(SCRIPTS, free_files=0), "fault", "0 files left"),
        (JOBS, "ok", "/srv/jobs"),
        (replace(JOBS, kind="nfs4"), "ok", "nfs4"),
        (replace(JOBS, ours=False, owner="root", mode=0o775), "ok", "root's"),
        (replace(JOBS, mode=0o1777), "ok", "mode 1777"),
        (replace(JOBS, mode=0o777), "warning", "others may remove"),
    ],
)
def test_a_folder(folder: folders.Folder, verdict: str, detail: str) -> None:
    (found,) = folders.judge(folder)
    assert found.verdict == verdict
    assert detail in found.detail


def test_everything_that_is_wrong_with_a_folder_is_told() -> None:
    bad = replace(SCRIPTS, mode=0o777, kind="nfs", free_bytes=0)
    assert [found.verdict for found in folders.judge(bad)] == ["fault", "warning", "fault"]


async def test_real_folders_are_seen_as_they_are(settings: Settings, tmp_path: Path) -> None:
    settings.scripts_dir.mkdir(parents=True, mode=0o750)
    scripts, jobs = folders.look(settings)
    assert (scripts.exists, scripts.mode, scripts.ours, scripts.writable) == (True, 0o750, True, True)
    assert (jobs.exists, jobs.is_folder) == (False, True)
    assert scripts.free_bytes > 0
    settings.scripts_dir.rmdir()
    settings.scripts_dir.touch()
    assert not folders.look(settings)[0].is_folder
    settings.scripts_dir.unlink()
    settings.scripts_dir.symlink_to(tmp_path / "nowhere")
    assert [found.verdict for found in folders.judge(folders.look(settings)[0])] == ["fault"]


# PostgreSQL

SERVER = postgres.Server(
    version_num=180001,
    version="18.1",
    fsync="on",
    full_page_writes="on",
    synchronous_commit="on",
    in_recovery=False,
    synchronous_standby_names="",
    may_be_opened=97,
    autovacuum=True,
)


@pytest.mark.parametrize(
    ("changes", "what", "verdict"),
    [
        ({}, "PostgreSQL", "ok"),
        ({"version_num": 150000}, "PostgreSQL", "ok"),
        ({"version_num": 149999}, "PostgreSQL", "fault"),
        ({}, "primary", "ok"),
        ({"in_recovery": True}, "primary", "fault"),
        ({}, "fsync", "ok"),
        ({"fsync": "off"}, "fsync", "fault"),
        ({}, "full_page_writes", "ok"),
        ({"full_page_writes": "off"}, "full_page_writes", "fault"),
        ({}, "synchronous_commit", "ok"),
        ({"synchronous_commit": "off"}, "synchronous_commit", "fault"),
        ({}, "autovacuum", "ok"),
        ({"autovacuum": False}, "autovacuum", "warning"),
    ],
)
def test_a_server(changes: dict[str, Any], what: str, verdict: str) -> None:
    server = replace(SERVER, **changes)
    assert said(postgres.judge_server(server, unsafe=False), what)[0] == verdict
    told = said(postgres.judge_server(server, unsafe=True), what)[0]
    assert told == ("warning" if what in ("fsync", "full_page_writes") and verdict == "fault" else verdict)


@pytest.mark.parametrize(
    ("names", "standbys", "verdict", "detail"),
    [
        ("", {}, "ok", "none is connected"),
        ("", {"b": "async"}, "warning", "b: promoted, it lacks what it had not received"),
        ("", {"b": None}, "warning", "b: promoted"),
        ("b", {"b": "sync", "c": "async"}, "ok", "commits wait for b"),
        ("ANY 1 (b, c)", {"b": "quorum", "c": "quorum"}, "ok", "commits wait for ANY 1 (b, c)"),
        ("b", {"b": None}, "ok", "commits wait for b"),
        ("b", {"c": "async"}, "fault", "every commit waits for b"),
        ("b", {}, "fault", "every commit waits for b"),
    ],
)
def test_standbys(names: str, standbys: dict[str, str | None], verdict: str, detail: str) -> None:
    server = replace(SERVER, synchronous_standby_names=names)
    found = postgres.judge_standbys(server, [postgres.Standby(*standby) for standby in standbys.items()])
    assert found.verdict == verdict
    assert detail in found.detail


@pytest.mark.parametrize(
    ("opened", "workers", "room", "verdict", "detail"),
    [
        ({}, 0, 16, "ok", "1 api, 1 scheduler, 1 worker open up to 16, others have 0, of 16"),
        ({}, 0, 15, "fault", "of 15"),
        ({}, 41, 97, "ok", "41 workers open up to 96"),
        ({}, 42, 97, "fault", "42 workers open up to 98"),
        ({"rowlock api a": 9, "rowlock api b": 2}, 1, 97, "ok", "2 apis, 1 scheduler, 1 worker open up to 26"),
        ({"rowlock worker a": 1, "rowlock worker b": 1}, 1, 97, "ok", "2 workers open up to 18"),
        ({"psql": 82}, 1, 97, "fault", "others have 82"),
        ({"rowlock worker a": 80}, 1, 97, "ok", "others have 0"),
    ],
)
def test_connections(opened: dict[str, int], workers: int, room: int, verdict: str, detail: str) -> None:
    found = postgres.judge_connections(replace(SERVER, may_be_opened=room), opened, workers)
    assert found.verdict == verdict
    assert detail in found.detail


def test_the_roles_open_what_they_are_said_to_open() -> None:
    assert postgres.CONNECTIONS == {
        "api": api.POOL_SIZE + 2,  # what stores, what notifies
        "scheduler": scheduler.POOL_SIZE + 2,  # what leads and listens, what allocates
        "worker": worker.POOL_SIZE + 1,  # what may start something
    }


@pytest.mark.parametrize(
    ("distance", "what", "verdict", "detail"),
    [
        (postgres.Distance(0.0002, 0.0004), "PostgreSQL's distance", "ok", "0.2 ms"),
        (postgres.Distance(0.05, 0.0), "PostgreSQL's distance", "warning", "50.0 ms"),
        (postgres.Distance(0.0002, 0.5), "clock", "ok", "0.500 s behind"),
        (postgres.Distance(0.0002, 3.0), "clock", "warning", "3.000 s behind"),
        (postgres.Distance(0.0002, -3.0), "clock", "warning", "3.000 s ahead of"),
    ],
)
def test_distance_and_clock(distance: postgres.Distance, what: str, verdict: str, detail: str) -> None:
    found = said(postgres.judge_distance(distance), what)
    assert found[0] == verdict
    assert detail in found[1]


@pytest.mark.parametrize(
    ("held", "verdict"),
    [
        (schema.VERSION, "ok"),
        (None, "warning"),
        (schema.VERSION - 1, "warning"),
        (schema.VERSION + 1, "fault"),
        (SchemaMismatch("foreign"), "fault"),
    ],
)
def test_a_schema(held: int | SchemaMismatch | None, verdict: str) -> None:
    assert postgres.judge_schema(held).verdict == verdict


async def test_the_lease_of_a_node(connection: asyncpg.Connection) -> None:
    async def judged() -> tuple[str, str]:
        found = postgres.judge_node("n1", "here", await nodes.all_nodes(connection))
        return found.verdict, found.detail

    assert await judged() == ("warning", "n1 is not registered; there is none")
    await register(connection, a_node("n1", hostname="there"))
    assert await judged() == ("warning", "n1 is held by a worker on there")
    await connection.execute("UPDATE node_leases SET hostname = 'here'")
    assert await judged() == ("ok", "n1 is held by this host's worker")
    await connection.execute("UPDATE nodes SET admin_state = 'DRAIN', admin_reason = 'disk'")
    assert await judged() == ("warning", "n1 is in DRAIN: disk")
    await connection.execute("UPDATE node_leases SET lease_until = clock_timestamp()")
    assert await judged() == ("warning", "n1: its lease is over")


# Redis

REDIS = redis.Server("Redis", "7.4.1", 10 * 2**20, 0, "noeviction", 0.0001)


@pytest.mark.parametrize(
    ("changes", "what", "verdict"),
    [
        ({}, "Redis", "ok"),
        ({"version": "6.2.0"}, "Redis", "ok"),
        ({"version": "6.0.16"}, "Redis", "fault"),
        ({"version": "10.0"}, "Redis", "ok"),
        ({"name": "Valkey", "version": "9.1"}, "Redis", "ok"),
        ({}, "maxmemory-policy", "ok"),
        ({"maxmemory": 2**30}, "maxmemory-policy", "ok"),
        ({"maxmemory": 2**20}, "maxmemory-policy", "warning"),
        ({"maxmemory": 2**30, "maxmemory_policy": "allkeys-lru"}, "maxmemory-policy", "warning"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy", "ok"),
        ({"maxmemory": 2**30, "maxmemory_policy": "volatile-lru"}, "maxmemory-policy", "ok"),
        ({}, "Redis's distance", "ok"),
        ({"round_trip": 0.1}, "Redis's distance", "warning"),
    ],
)
def test_a_redis(changes: dict[str, Any], what: str, verdict: str) -> None:
    assert said(redis.judge(replace(REDIS, **changes)), what)[0] == verdict


# The command

SERVERS = {"PostgreSQL", "primary", "fsync", "full_page_writes", "synchronous_commit", "autovacuum", "standbys"}
SERVERS |= {"PostgreSQL's distance", "clock", "schema", "connections", "NODE_NAME"}
SERVERS |= {"Redis", "maxmemory-policy", "Redis's distance"}


async def report(settings: Settings, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code, and the verdicts by what was looked at."""
    code = await command.doctor(settings, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    verdicts = {finding["what"]: finding["verdict"] for finding in printed["findings"]}
    assert printed["faults"] == sum(finding["verdict"] == "fault" for finding in printed["findings"])
    assert code == (1 if printed["faults"] else 0)
    return code, verdicts


async def test_a_look_at_what_is_there_changes_nothing(
    settings: Settings,
    connection: asyncpg.Connection,
    redis_client: Redis,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = await contents(connection), await redis_client.keys("*"), listed(tmp_path)
    fsync = await connection.fetchval("SHOW fsync") == "on"
    _, verdicts = await report(settings, capsys)
    assert set(verdicts) >= SERVERS | {"kernel", "containment", "isolation", folders.SCRIPTS, folders.JOBS}
    assert verdicts["fsync"] == ("ok" if fsync else "warning")
    assert verdicts["NODE_NAME"] == "warning"
    others = SERVERS - {"fsync", "full_page_writes", "NODE_NAME", "standbys", "connections", "clock"}
    assert {verdicts[what] for what in others - {"PostgreSQL's distance", "Redis's distance"}} == {"ok"}
    code, verdicts = await report(settings.model_copy(update={"unsafe": False}), capsys)
    assert (code, verdicts["fsync"]) == ((0, "ok") if fsync else (1, "fault"))
    assert before == (await contents(connection), await redis_client.keys("*"), listed(tmp_path))


def listed(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


NAMES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1"


async def contents(connection: asyncpg.Connection) -> list[tuple[str, int]]:
    names = [row[0] for row in await connection.fetch(NAMES)]
    return [(name, await connection.fetchval(f'SELECT count(*) FROM "{name}"')) for name in names]


async def test_a_line_for_each_check(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    await command.doctor(settings, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "fault"}
    assert len(lines) > len(SERVERS)
    assert str(fault("what", "is so", "as it should be")) == f"fault    {'what':<22}  is so (as it should be)"
    assert str(ok("what", "is so")).endswith("is so")


async def test_an_empty_and_a_foreign_database(
    settings: Settings, empty_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = settings.model_copy(update={"database_url": SecretStr(empty_url)})
    _, verdicts = await report(there, capsys)
    assert (verdicts["schema"], "NODE_NAME" in verdicts) == ("warning", False)
    foreign = await asyncpg.connect(empty_url)
    await foreign.execute("CREATE TABLE invoices (number integer)")
    await foreign.close()
    _, verdicts = await report(there, capsys)
    assert verdicts["schema"] == "fault"


async def test_servers_that_are_away_are_the_faults(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    away = {
        "database_url": SecretStr(f"postgresql://me:hunter2@127.0.0.1:{free_port()}/rowlock"),
        "redis_url": SecretStr(f"redis://:hunter2@127.0.0.1:{free_port()}/0"),
    }
    code, verdicts = await report(settings.model_copy(update=away), capsys)
    assert code == 1
    assert {what: verdict for what, verdict in verdicts.items() if what in SERVERS} == {
        "PostgreSQL": "fault",
        "Redis": "fault",
    }
    assert "kernel" in verdicts
    await command.doctor(settings.model_copy(update=away), as_json=False)
    assert "hunter2" not in capsys.readouterr().out


@pytest.fixture
async def holes(database_url: str, redis_url: str) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """Ways to both servers."""
    async with proxied(database_url) as one, proxied(redis_url) as two:
        yield one, two


@pytest.mark.parametrize("from_the_start", [True, False])
async def test_servers_that_say_nothing_are_not_waited_for(
    from_the_start: bool,
    settings: Settings,
    holes: tuple[Proxy, Proxy],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(postgres, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(streams, "ANSWER_SECONDS", 0.5)
    for hole, word in zip(holes, (b"server_version_num", b"INFO"), strict=True):
        if from_the_start:
            hole.silence()
        else:
            hole.at(word, Fault.HOLE_AFTER)
    silent = {name: SecretStr(hole.url) for name, hole in zip(("database_url", "redis_url"), holes, strict=True)}
    async with asyncio.timeout(20):
        _, verdicts = await report(settings.model_copy(update=silent), capsys)
    assert (verdicts["PostgreSQL"], verdicts["Redis"]) == ("fault", "fault")
    assert from_the_start or all(hole.tripped.is_set() for hole in holes)


async def test_a_file_system_that_hangs_is_not_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(folders, "look", lambda _: [over.wait(60)][1:])
    try:
        async with asyncio.timeout(20):
            _, verdicts = await report(settings, capsys)
    finally:
        over.set()
    assert verdicts["folders"] == "fault"


async def test_a_folder_that_may_not_be_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> list[folders.Folder]:
        raise PermissionError("no")

    monkeypatch.setattr(folders, "look", refuse)
    _, verdicts = await report(settings, capsys)
    assert verdicts["folders"] == "fault"
