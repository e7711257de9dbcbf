"""What is deployed fits the program: compose.yaml, the systemd units, the examples, the image, the pins."""

import configparser
import re
import shlex
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from core import role as roles
from core.settings import PATH_DEFAULT, Settings, load
from services.cli import commands

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {name.upper() for name in Settings.model_fields}
ROLES = ("api", "scheduler", "worker")
SERVICES = ("postgres", "redis", *ROLES)
UNITS = sorted((ROOT / "config" / "systemd").glob("*.service"))
# What a default is made of on each machine, or nothing is: the example shows a value of that kind.
SHOWN_ONLY = {"node_name", "total_cpus", "worker_address", "database_url", "redis_url"}

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(:?[-?])?([^}]*)\}")


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def example(path: str) -> dict[str, str]:
    """Every setting of an example, those in comments too."""
    found = re.findall(r"(?m)^#?([A-Z][A-Z_]*)=(.*)$", text(path))
    assert len(found) == len(dict(found)), "a setting stands there twice"
    return dict(found)


def understood(command: list[str]) -> str:
    """The command that `rowlock` reads out of a command line; SystemExit when it does not."""
    program, *arguments = command
    assert Path(program).name == "rowlock"
    options, rest = commands.parse(arguments)
    if options.command in ROLES:
        roles.arguments(options.command, rest)
    return str(options.command)


# compose.yaml. Checked against the Compose specification's JSON schema by hand: nobody ships it in a package.


def test_the_services_are_those_of_a_whole_system() -> None:
    assert set(COMPOSE["services"]) == set(SERVICES)
    assert set(COMPOSE) - {"name", "services", "volumes"} == {"x-role", "x-settings", "x-healthcheck"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_comes_back_is_checked_and_may_have_replicas(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "unless-stopped"
    assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    assert not {"container_name", "hostname"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_the_loopback_alone(name: str) -> None:
    ports = COMPOSE["services"][name].get("ports", [])
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+", port) for port in ports)
    assert bool(ports) is (name in ("postgres", "redis", "api"))  # a worker with a port could not be scaled


@pytest.mark.parametrize("role", ROLES)
def test_a_role_runs_and_is_checked_by_the_program(role: str) -> None:
    service = COMPOSE["services"][role]
    assert understood(service["command"]) == role
    kind, *check = service["healthcheck"]["test"]
    assert (kind, understood(check), check[-1]) == ("CMD", "health", role)
    assert service["init"] is True
    assert service["build"]["dockerfile"] == "config/Dockerfile"


def test_named_volumes_are_declared() -> None:
    used = {volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", ())}
    assert used == set(COMPOSE["volumes"]) == {"postgres", "redis", "jobs"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting(name: str) -> None:
    assert set(COMPOSE["services"][name].get("environment", {})) <= SETTINGS


def test_no_password_has_a_default() -> None:
    found = VARIABLE.findall(text("compose.yaml"))
    assert {name for name, *_ in found} <= SETTINGS
    for name, operator, rest in found:
        assert (operator == ":?") is name.endswith("_PASSWORD"), name
        assert rest or operator == ":-", name
    assert {name for name, operator, _ in found if operator == ":?"} == {"POSTGRES_PASSWORD", "REDIS_PASSWORD"}
    stray = re.findall(r"(?m)^.*PASSWORD: (?!\$\{).*$", text("compose.yaml"))
    assert stray == []


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_variables_are_good_settings(role: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = loaded(role_environment(role), monkeypatch, tmp_path)
    assert (settings.postgres_host, settings.redis_host) == ("postgres", "redis")
    assert settings.postgres_password is not None
    if role == "api":
        assert (settings.api_host, settings.auth) == ("0.0.0.0", "none")  # noqa: S104
    if role == "worker":
        grace = COMPOSE["services"]["worker"]["stop_grace_period"]
        assert int(grace.removesuffix("s")) > settings.kill_grace_seconds + 15
        assert settings.worker_host == "0.0.0.0"  # noqa: S104
        assert settings.end_jobs
        assert "NODE_NAME" not in role_environment("worker")  # the container's own


def role_environment(role: str) -> dict[str, str]:
    """A role's variables as Compose fills them in from an .env with passwords alone."""
    values = COMPOSE["services"][role]["environment"]
    given = {"POSTGRES_PASSWORD": "one", "REDIS_PASSWORD": "two"}

    def filled(found: "re.Match[str]") -> str:
        return given.get(found[1], found[3] if found[2] == ":-" else "")

    return {key: VARIABLE.sub(filled, str(value)) for key, value in values.items()}


def loaded(values: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Settings:
    """The settings of these values alone."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    file = folder / "settings"
    file.write_text("".join(f"{key}={value}\n" for key, value in values.items()), encoding="utf-8")
    return load(file)


# The examples.


def test_the_properties_example_shows_every_setting_in_a_comment() -> None:
    lines = text("config/rowlock.properties.example").splitlines()
    assert all(not line or line.startswith("#") for line in lines)
    assert set(example("config/rowlock.properties.example")) == SETTINGS


def test_what_the_properties_example_shows_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = example("config/rowlock.properties.example")
    shown = loaded(values, monkeypatch, tmp_path)
    plain = Settings.model_construct()
    for name in set(Settings.model_fields) - SHOWN_ONLY:
        assert getattr(shown, name) == expected(name, plain), name


def expected(name: str, plain: Settings) -> object:
    """A default, as it is where the program runs."""
    folders = {"data_dir": ".rowlock", "job_work_base_dir": ".rowlock/jobs", "script_dir": ".rowlock/scripts"}
    folders["log_dir"] = "logs"
    return Path(folders[name]).absolute() if name in folders else getattr(plain, name)


def test_the_properties_example_is_of_use_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert loaded(example("config/rowlock.properties.example"), monkeypatch, tmp_path).job_path == PATH_DEFAULT


def test_example_env_names_what_compose_asks_for() -> None:
    values = example("config/example.env")
    assert set(values) <= SETTINGS
    asked = {name for name, *_ in VARIABLE.findall(text("compose.yaml"))}
    assert set(values) == asked
    active = re.findall(r"(?m)^([A-Z_]+)=(.*)$", text("config/example.env"))
    assert active == [("POSTGRES_PASSWORD", ""), ("REDIS_PASSWORD", "")]
    defaults = {name: rest for name, operator, rest in VARIABLE.findall(text("compose.yaml")) if operator == ":-"}
    for name, default in defaults.items():
        assert default in ("", values[name]), name


# The units.


def unit(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, delimiters="=", strict=True)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(path.read_text(encoding="utf-8"))
    return found


def test_there_is_a_unit_for_each_role_and_one_target_for_all() -> None:
    assert [path.name for path in UNITS] == [f"rowlock-{role}.service" for role in ROLES]
    assert (ROOT / "config/systemd/rowlock.target").is_file()


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_its_role_with_settings_of_its_machine(path: Path) -> None:
    service = unit(path)["Service"]
    assert understood(shlex.split(service["ExecStart"])) == path.stem.removeprefix("rowlock-")
    assert service["EnvironmentFile"].startswith("/etc/")
    assert {word.split("=")[0] for word in shlex.split(service["Environment"])} <= SETTINGS
    assert service["User"] == "rowlock"
    assert service["Restart"] == "always"
    assert "2" in service["RestartPreventExitStatus"].split()
    assert unit(path)["Install"]["WantedBy"] == unit(path)["Unit"]["PartOf"] == "rowlock.target"


def test_a_stopped_worker_unit_leaves_its_jobs_alone() -> None:
    service = unit(ROOT / "config/systemd/rowlock-worker.service")["Service"]
    assert (service["KillMode"], service["Delegate"]) == ("process", "yes")
    assert int(service["TimeoutStopSec"]) > Settings.model_construct().kill_grace_seconds + 15


# The image, CI, the pins.


def test_the_image_is_plain_and_not_roots() -> None:
    lines = text("config/Dockerfile").splitlines()
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert [line for line in lines if line.startswith("USER ")] == ["USER rowlock"]
    assert any("uv sync" in line and "--no-dev" in line and "--extra" not in line for line in lines)
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert copied == {
        line.removeprefix("!") for line in text("config/Dockerfile.dockerignore").splitlines() if line[0] == "!"
    }
    assert all((ROOT / name).exists() for name in copied)


def test_ci_runs_the_readmes_command() -> None:
    steps = [line for line in text(".ci/run").splitlines() if line.startswith("python3 ")]
    assert " && ".join(steps) == "python3 -m pip install uv && python3 -m uv run just test"
    assert "set -eu" in text(".ci/run")


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads(text("pyproject.toml"))
    pins = project["tool"]["uv"]
    exact = re.compile(r"([a-z0-9-]+)==[0-9][\w.+!]*( ; .+)?")
    names = {}
    for key in ("constraint-dependencies", "build-constraint-dependencies"):
        found = [exact.fullmatch(line) for line in pins[key]]
        assert all(found), key
        names[key] = {match[1] for match in found if match}
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["embedded"]]
    wanted += project["dependency-groups"]["dev"]
    required = {re.split(r"[\[<>=!~ ;]", line)[0] for line in wanted} - {"rowlock"}
    assert required <= names["constraint-dependencies"]
    assert "hatchling" in names["build-constraint-dependencies"]


def test_just_alone_lists_what_there_is_with_a_line_each() -> None:
    just = Path(sysconfig.get_path("scripts")) / "just"
    done = subprocess.run((just, "--justfile", ROOT / "justfile"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0]: "# " in line for line in done.stdout.splitlines()[1:]}
    asked = {"dev-infra", "dev-scheduler", "dev-worker", "dev-api", "up", "demo", "test", "check", "fmt", "bench"}
    asked |= {"audit", "bench-peers", "bench-scale", "chaos", "doctor", "reset", "logs", "scale", "pins"}
    assert listed == dict.fromkeys(asked, True)
