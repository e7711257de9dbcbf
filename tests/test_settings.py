"""Settings: where they come from, what they may be, and how a bad one is told."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from core import role
from core.errors import SettingsError
from core.settings import DEFAULT_FILE, Settings, load, obsolete, settings_file, usable_cpus, without_secrets

# Every name of the README with a value, and what becomes of it.
NAMES: dict[str, tuple[str, Callable[[Settings], Any], Any]] = {
    "POSTGRES_HOST": ("db", lambda s: s.postgres_host, "db"),
    "POSTGRES_PORT": ("5433", lambda s: s.postgres_port, 5433),
    "POSTGRES_DB": ("jobs", lambda s: s.postgres_db, "jobs"),
    "POSTGRES_USER": ("me", lambda s: s.postgres_user, "me"),
    "POSTGRES_PASSWORD": ("p", lambda s: s.postgres_password.get_secret_value(), "p"),
    "REDIS_HOST": ("cache", lambda s: s.redis_host, "cache"),
    "REDIS_PORT": ("6380", lambda s: s.redis_port, 6380),
    "REDIS_DB": ("3", lambda s: s.redis_db, 3),
    "REDIS_PASSWORD": ("p", lambda s: s.redis_password.get_secret_value(), "p"),
    "DATABASE_URL": ("postgresql://u:p@h/d", lambda s: s.postgres_dsn, "postgresql://u:p@h/d"),
    "REDIS_URL": ("redis://h:1/2", lambda s: s.redis_dsn, "redis://h:1/2"),
    "NODE_NAME": ("node-7", lambda s: s.node_name, "node-7"),
    "TOTAL_CPUS": ("16", lambda s: s.total_cpus, 16),
    "JOB_WORK_BASE_DIR": ("/srv/jobs", lambda s: s.work_base_dir, Path("/srv/jobs")),
    "SCRIPT_DIR": ("/srv/scripts", lambda s: s.scripts_dir, Path("/srv/scripts")),
    "ALLOWED_ROOTS": ("/home, /data", lambda s: s.allowed_roots, (Path("/home"), Path("/data"))),
    "API_HOST": ("::1", lambda s: s.api_host, "::1"),
    "API_PORT": ("9000", lambda s: s.api_port, 9000),
    "AUTH": ("none", lambda s: s.auth, "none"),
    "ALLOWED_HOSTS": ("a.example,b.example", lambda s: s.allowed_hosts, ("a.example", "b.example")),
    "WORKER_HOST": ("10.0.0.1", lambda s: s.worker_host, "10.0.0.1"),
    "WORKER_ADDRESS": ("http://n7:1", lambda s: s.worker_address, "http://n7:1"),
    "UNSAFE": ("true", lambda s: s.unsafe, True),
    "LOG_LEVEL": ("DEBUG", lambda s: s.log_level, "DEBUG"),
    "LOG_DIR": ("/var/log/rowlock", lambda s: s.log_dir, Path("/var/log/rowlock")),
    "PARTITIONS": ("batch, debug", lambda s: s.partitions, ("batch", "debug")),
    "HEARTBEAT_SECONDS": ("2.5", lambda s: s.heartbeat_seconds, 2.5),
    "LEASE_SECONDS": ("20", lambda s: s.lease_seconds, 20),
    "KILL_GRACE_SECONDS": ("0", lambda s: s.kill_grace_seconds, 0),
    "POLL_SECONDS": ("0.5", lambda s: s.poll_seconds, 0.5),
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that says nothing, and a folder with nothing in it."""
    for name in [*Settings.model_fields, "worker_concurrency"]:
        for spelled in (name, name.upper()):
            monkeypatch.delenv(spelled, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.properties"


def refused(file: Path | None = None) -> str:
    """The text of the refusal."""
    with pytest.raises(SettingsError) as caught:
        load(file)
    return str(caught.value)


# Where they come from


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_from_the_environment_and_from_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    text, of, value = NAMES[name]
    assert of_or_none(load(), of) != value
    file.write_text(f"# a comment\n\n{name}={text}\n")
    assert of(load(file)) == value
    monkeypatch.setenv(name, text)
    assert of(load()) == value


def of_or_none(settings: Settings, of: Callable[[Settings], Any]) -> Any:
    try:
        return of(settings)
    except AttributeError:
        return None


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    file.write_text("API_PORT=1111\nTOTAL_CPUS=3\n")
    monkeypatch.setenv("API_PORT", "2222")
    settings = load(file)
    assert (settings.api_port, settings.total_cpus, settings.redis_port) == (2222, 3, 6379)


@pytest.mark.parametrize("flags", [(), ("--unsafe",), ("--end-jobs", "--unsafe")])
def test_a_switch_of_the_command_line_reaches_the_role(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    seen: list[Settings] = []

    async def main(settings: Settings, _: asyncio.Event) -> None:
        seen.append(settings)

    assert role.run("worker", main, asyncio.new_event_loop, list(flags)) == 0
    (settings,) = seen
    assert (settings.end_jobs, settings.unsafe) == ("--end-jobs" in flags, "--unsafe" in flags)


def test_what_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text("API_PORT=1111\nREDIS_PORT=\n")
    monkeypatch.setenv("API_PORT", "")
    settings = load(file)
    assert (settings.api_port, settings.redis_port) == (1111, 6379)


def test_the_default_file_is_read_where_it_is_there(tmp_path: Path) -> None:
    assert settings_file(None) is None
    (tmp_path / "config").mkdir()
    (tmp_path / "config/rowlock.properties").write_text("API_PORT=1111\n")
    assert settings_file(None) == DEFAULT_FILE
    assert load().api_port == 1111


def test_a_file_that_is_named_wins_over_the_default_one(tmp_path: Path, file: Path) -> None:
    (tmp_path / DEFAULT_FILE).parent.mkdir()
    (tmp_path / DEFAULT_FILE).write_text("API_PORT=1111\nREDIS_PORT=1\n")
    file.write_text("API_PORT=2222\n")
    settings = load(file)
    assert (settings.api_port, settings.redis_port) == (2222, 6379)


def test_defaults() -> None:
    settings = load()
    assert settings.node_name == socket.gethostname()
    assert settings.total_cpus == usable_cpus()
    assert settings.partitions == ("default",)
    assert (settings.api_host, settings.api_port, settings.auth) == ("127.0.0.1", 8000, "")
    assert settings.worker_host == "127.0.0.1"
    assert (settings.heartbeat_seconds, settings.lease_seconds) == (5, 30)
    assert (settings.kill_grace_seconds, settings.poll_seconds) == (30, 1)
    assert settings.log_dir.name == "logs"


def test_jobs_and_scripts_lie_under_the_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "/srv/rowlock")
    settings = load()
    assert (settings.work_base_dir, settings.scripts_dir) == (Path("/srv/rowlock/jobs"), Path("/srv/rowlock/scripts"))
    assert settings.roots == (Path("/srv/rowlock/jobs"),)


def test_a_url_wins_over_the_single_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_HOST", "elsewhere")
    monkeypatch.setenv("REDIS_HOST", "elsewhere")
    monkeypatch.setenv("DATABASE_URL", "postgresql://here/d")
    monkeypatch.setenv("REDIS_URL", "redis://here/1")
    assert (load().postgres_dsn, load().redis_dsn) == ("postgresql://here/d", "redis://here/1")


def test_addresses_are_made_of_the_single_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever characters a password has."""
    assert load().postgres_dsn == "postgresql://rowlock@localhost:5432/rowlock"
    assert load().redis_dsn == "redis://localhost:6379/0"
    for name, value in {"POSTGRES_PASSWORD": "a/b@c:d%", "REDIS_PASSWORD": "a/b@c:d%", "POSTGRES_HOST": "::1"}.items():
        monkeypatch.setenv(name, value)
    assert load().postgres_dsn == "postgresql://rowlock:a%2Fb%40c%3Ad%25@[::1]:5432/rowlock"
    assert load().redis_dsn == "redis://:a%2Fb%40c%3Ad%25@localhost:6379/0"
    monkeypatch.setenv("POSTGRES_HOST", "/run/postgresql")
    assert load().postgres_dsn == "postgresql://rowlock:a%2Fb%40c%3Ad%25@/rowlock?host=/run/postgresql&port=5432"


# Bad ones

BAD = {
    "POSTGRES_PORT": ["x", "-1", "65536", "1.5"],
    "REDIS_DB": ["-1"],
    "API_PORT": ["70000"],
    "TOTAL_CPUS": ["0", "-4", "many", "1e30"],
    "NODE_NAME": ["a b", "a/b", "a:b", "n" * 256, "a\tb"],
    "PARTITIONS": ["a,b c", ","],
    "HEARTBEAT_SECONDS": ["0", "-1", "nan", "inf", "soon"],
    "KILL_GRACE_SECONDS": ["-1"],
    "POLL_SECONDS": ["0"],
    "LOG_LEVEL": ["LOUD"],
    "AUTH": ["perhaps"],
    "LOG_DIR": ["~nobody-of-that-name/logs"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_a_bad_value_is_one_line_with_key_value_and_what_it_should_be(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """The same line, wherever it stands."""
    file.write_text(f'{name}="{value}"\n')
    from_file = refused(file)
    monkeypatch.setenv(name, value)
    assert refused() == from_file
    shown = value if value.isprintable() else ascii(value)
    assert from_file.startswith(f"{name}={shown}: should ")
    assert len(from_file.splitlines()) == 1


def test_the_value_that_counts_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text("API_PORT=file\n")
    monkeypatch.setenv("api_port", "environment")
    assert refused(file).startswith("API_PORT=environment: ")
    monkeypatch.setenv("api_port", "")
    assert refused(file).startswith("API_PORT=file: ")


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text("API_PORT=x\nLOG_LEVEL=LOUD\n")
    monkeypatch.setenv("TOTAL_CPUS", "0")
    assert {line.split("=")[0] for line in refused(file).splitlines()} == {"API_PORT", "LOG_LEVEL", "TOTAL_CPUS"}


@pytest.mark.parametrize(
    ("heartbeat", "lease", "good"), [("5", "10", True), ("5", "9.9", False), ("15", "30", True), ("16", "30", False)]
)
def test_a_lease_outlives_a_late_heartbeat(
    heartbeat: str, lease: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTBEAT_SECONDS", heartbeat)
    monkeypatch.setenv("LEASE_SECONDS", lease)
    if good:
        assert load().lease_seconds == float(lease)
    else:
        line = refused()
        assert line.startswith(f"LEASE_SECONDS={lease}: should be at least twice HEARTBEAT_SECONDS ({heartbeat})")
        assert len(line.splitlines()) == 1


# Secrets

URLS = {
    "DATABASE_URL": ["mysql://u:geheim@h/d", "geheim", "postgresql://u:geheim@h:x/d", "postgresql://u:geheim@[::1/d"],
    "REDIS_URL": ["http://:geheim@h", "geheim", "redis://:geheim@h:99999/0", "redis://:geheim@h:x"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in URLS for value in URLS[name]])
def test_a_bad_address_is_told_without_its_password(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    line = refused()
    assert line.startswith(f"{name}=(not shown): should be ")
    assert "geheim" not in line


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p@h/d",
        "postgresql:///d?host=/run/postgresql",
        "postgresql://u@[::1]:5432/d",
        "postgresql://u@a:1,b:2/d",
    ],
)
def test_addresses_of_all_kinds_are_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert load().postgres_dsn == url


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, "geheim")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:geheim@h/d?password=geheim")
    monkeypatch.setenv("REDIS_URL", "redis://:geheim@h")
    settings = load()
    assert "geheim" in settings.postgres_dsn
    assert "geheim" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    monkeypatch.setenv("TOTAL_CPUS", "x")
    assert "geheim" not in refused()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h:1/d", "postgresql://h:1/d"),
        ("postgresql://u:p%40@h/d?password=p&host=/run&port=1&sslmode=require", "postgresql://h/d?host=/run&port=1"),
        ("redis://:p@h:1/2", "redis://h:1/2"),
        ("unix:///run/redis.sock?password=p", "unix:///run/redis.sock"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


# The file


def test_a_file_that_is_not_there_is_named(file: Path) -> None:
    assert refused(file) == f"--config: there is no file {file}"


@pytest.mark.parametrize("text", ["API_PORT 1111", "API_PORT=1\nthis is geheim\n", "='x"])
def test_a_line_that_is_none_is_told_by_its_number(text: str, file: Path) -> None:
    file.write_text(f"TOTAL_CPUS=1\n{text}")
    line = refused(file)
    assert line.startswith(f"{file}, line ")
    assert line.endswith(": should be KEY=VALUE")


def test_a_file_that_is_no_text_is_told(file: Path) -> None:
    file.write_bytes(b"API_PORT=\xff\n")
    line = refused(file)
    assert line.startswith(f"{file}: ")
    assert len(line.splitlines()) == 1


# What is gone


@pytest.mark.parametrize("where", ["environment", "file", "both"])
def test_worker_concurrency_gets_a_warning(where: str, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    assert obsolete() is None
    file.write_text("" if where == "environment" else "WORKER_CONCURRENCY=4\n")
    assert (obsolete(file) is None) == (where == "environment")
    if where != "file":
        monkeypatch.setenv("WORKER_CONCURRENCY", "4")
    assert "one worker runs all jobs of its node" in str(obsolete(file))
    load(file)


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_role_warns_once_and_names_its_file_first(where: str, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    async def main(*_: object) -> None:
        pass

    file.write_text("WORKER_CONCURRENCY=4\n" if where == "file" else "\n")
    if where == "environment":
        monkeypatch.setenv("WORKER_CONCURRENCY", "4")
    monkeypatch.setattr(role.log, "configure", lambda *_: structlog.get_logger())
    with capture_logs() as logs:
        assert role.run("api", main, asyncio.new_event_loop, ["--config", str(file)]) == 0
    assert (logs[0]["event"], logs[0]["settings_file"]) == ("role_starting", str(file))
    assert [log["log_level"] for log in logs if log["event"] == "setting_obsolete"] == ["warning"]


def test_a_role_with_a_bad_setting_says_one_line_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main(*_: object) -> None:
        pytest.fail("it ran")

    monkeypatch.setenv("API_PORT", "x")
    assert role.run("api", main, asyncio.new_event_loop, []) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("API_PORT=x: should be")
    assert len(err.splitlines()) == 1


# CPUs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """What `usable_cpus` answers on a machine of 8 CPUs with these control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def answer(groups: str, files: dict[str, str]) -> int:
        (tmp_path / "cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return usable_cpus(tmp_path / "cgroup", tmp_path / "mount")

    return answer


V1 = "1:name=systemd:/x\n2:cpu,cpuacct:/a/b\n3:cpuset:/a/b\n"


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("", {}, 8),
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "350000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 1),
        ("0::/not/mounted\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_quota_counts_also_one_above(
    machine: Callable[..., int], groups: str, files: dict[str, str], cpus: int
) -> None:
    assert machine(groups, files) == cpus


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = os.sched_getaffinity(0)
    assert 1 <= usable_cpus() <= len(own)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert load().total_cpus == 1
    finally:
        os.sched_setaffinity(0, own)


def test_more_cpus_than_the_machine_has_may_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTAL_CPUS", "500000")
    assert load().total_cpus == 500_000
