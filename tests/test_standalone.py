"""The embedded servers and the guards of the stack, against the real binaries."""

import asyncio
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio

from services.standalone import embedded
from services.standalone.child import Child, Step, spawn
from services.standalone.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedRedis
from services.standalone.stack import StackError, check_port, claim

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0

# A process that owns both servers, says their pids, and does nothing more.
OWNER = """
import asyncio, sys
from pathlib import Path
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis

async def own():
    folder = Path(sys.argv[1])
    async with EmbeddedPostgres(folder, throwaway=True) as one, EmbeddedRedis(folder) as two:
        print(one.child.pid, two.child.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(own())
"""


async def count_starts(postgres: EmbeddedPostgres, server: EmbeddedRedis) -> tuple[int, int]:
    """Write one row and one key more; how many there are of each."""
    connection = await asyncpg.connect(postgres.url)
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS starts (at timestamptz DEFAULT now())")
        await connection.execute("INSERT INTO starts DEFAULT VALUES")
        rows = await connection.fetchval("SELECT count(*) FROM starts")
    finally:
        await connection.close()
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        return rows, await client.incr("starts")
    finally:
        await client.aclose()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def socket_inodes(pid: int) -> set[str]:
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def tcp_listeners() -> set[str]:
    """The inodes of every listening TCP socket of the machine."""
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {fields[9] for fields in map(str.split, lines) if fields[3] == "0A"}


async def start_twice(folder: Path) -> list[tuple[int, int]]:
    found = []
    for _ in range(2):
        async with EmbeddedPostgres(folder, throwaway=True) as postgres, EmbeddedRedis(folder) as server:
            found.append(await count_starts(postgres, server))
    return found


def test_data_survives_a_restart(tmp_path: Path) -> None:
    assert asyncio.run(start_twice(tmp_path / "data")) == [(1, 1), (2, 2)]


def test_a_long_path_is_no_obstacle_and_leaves_no_folder_elsewhere(tmp_path: Path) -> None:
    async def start() -> Path:
        folder = tmp_path / ("d" * 100)
        async with EmbeddedPostgres(folder, throwaway=True) as postgres, EmbeddedRedis(folder) as server:
            assert await count_starts(postgres, server) == (1, 1)
            assert not postgres.run_dir.is_relative_to(folder)
            assert mode(postgres.run_dir) == 0o700
            return postgres.run_dir

    assert not asyncio.run(start()).exists()


def test_nobody_else_can_reach_them(tmp_path: Path) -> None:
    async def look() -> None:
        folder = tmp_path / "data"
        async with EmbeddedPostgres(folder, throwaway=True) as postgres, EmbeddedRedis(folder) as server:
            assert [mode(path) for path in (folder, postgres.run_dir, postgres.cluster)] == [0o700] * 3
            assert mode(server.socket) & 0o077 == 0
            assert mode(postgres.run_dir / ".s.PGSQL.5432") & 0o077 == 0
            for owner in (postgres, server):
                assert owner.child is not None
                assert not socket_inodes(owner.child.pid) & tcp_listeners()
            connection = await asyncpg.connect(postgres.url)
            shown = [await connection.fetchval(f"SHOW {name}") for name in ("fsync", "listen_addresses")]
            await connection.close()
            assert shown == ["on", ""]

    asyncio.run(look())


def gone(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], PATIENCE)[0])


def test_a_killed_owner_takes_its_servers_along_and_the_next_start_is_clean(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = (sys.executable, "-c", OWNER, str(folder))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        assert select.select([owner.stdout], [], [], PATIENCE)[0]
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        owner.kill()
    try:
        assert len(pidfds) == 2
        assert [gone(pidfd) for pidfd in pidfds] == [True, True]
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    assert asyncio.run(start_twice(folder))[0][0] == 1


def test_killed_servers_start_again_over_what_they_left(tmp_path: Path) -> None:
    async def kill_and_start() -> tuple[int, int]:
        folder = tmp_path / "data"
        postgres, server = EmbeddedPostgres(folder, throwaway=True), EmbeddedRedis(folder)
        async with postgres, server:
            await count_starts(postgres, server)
            for victim in (postgres, server):
                assert victim.child is not None
                victim.child.process.send_signal(signal.SIGKILL)
                assert await victim.wait() == -signal.SIGKILL
                await victim.start()
            return await count_starts(postgres, server)

    assert asyncio.run(kill_and_start())[0] == 2  # a committed row stays; the key was a hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another identity for PostgreSQL")
def test_root_without_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, account = embedded._identities()
    refused = mapped.replace("mapped:", "mapped:no")
    monkeypatch.setattr(embedded, "_identities", lambda: [refused, account])
    # Only root comes to the binaries.
    newest, private = embedded.postgres_folders()[-1], tmp_path / "private"
    private.mkdir(mode=0o700)
    installed = newest.parents[2]
    for part in installed.glob(f"{newest.parents[1].name}*"):
        shutil.copytree(part, private / part.name)
    monkeypatch.setattr(embedded, "postgres_folders", lambda: [private / newest.relative_to(installed)])
    assert asyncio.run(start_twice(tmp_path / "data")) == [(1, 1), (2, 2)]


def test_a_missing_extra_is_one_line_that_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"rowlock\[embedded\].*DATABASE_URL and REDIS_URL") as caught:
        embedded.redis_binary()
    assert "\n" not in str(caught.value)


def test_another_platform_is_told_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.platform, "machine", lambda: "riscv64")
    with pytest.raises(EmbeddedError, match=r"x86-64 or arm64, this is \w+ riscv64") as caught:
        embedded.postgres_folders()
    assert "\n" not in str(caught.value)


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(EmbeddedError, match="other users"):
        embedded.make_private(folder)


def test_a_second_claim_of_a_directory_names_the_first(tmp_path: Path) -> None:
    with claim(tmp_path, 8123):
        with pytest.raises(StackError, match=f"pid {os.getpid()}, port 8123") as caught, claim(tmp_path, 1):
            pass
        assert "\n" not in str(caught.value)
    with claim(tmp_path, 8124):
        pass


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} of 127.0.0.1 is taken"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def stubborn() -> Child:
    """A process that takes no hint but SIGKILL."""
    return spawn(
        "stubborn",
        ("/bin/sh", "-c", "trap '' TERM; echo $$ >&2; exec sleep 600"),
        env={},
        dying=signal.SIGKILL,
    )


def test_a_child_that_does_not_listen_is_killed_in_the_end() -> None:
    async def end() -> int:
        return await stubborn().stop((Step(signal.SIGTERM, 0.1), Step(signal.SIGTERM, 0.1)))

    assert asyncio.run(end()) in (-signal.SIGKILL, -signal.SIGTERM)  # TERM where it came before the trap


def test_haste_cuts_the_first_wait_short() -> None:
    async def end() -> int:
        hasten = asyncio.Event()
        hasten.set()
        steps = (Step(signal.SIGTERM, 600), Step(signal.SIGTERM, 0.1))
        async with asyncio.timeout(PATIENCE):
            return await stubborn().stop(steps, hasten)

    assert asyncio.run(end()) in (-signal.SIGKILL, -signal.SIGTERM)
