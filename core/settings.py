"""Settings: the environment wins over a KEY=VALUE file, which wins over the defaults here."""

import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import SettingsError

DEFAULT_FILE = Path("config/rowlock.properties")
PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _words(value: Any) -> Any:
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _plain(value: str) -> str:
    if not 0 < len(value) <= 255 or not value.isprintable() or any(c.isspace() or c in "/:" for c in value):
        raise ValueError("should be 1 to 255 printable characters without blanks, '/' and ':'")
    return value


def _expanded(value: Path) -> Path:
    try:
        return value.expanduser().absolute()
    except RuntimeError:  # pydantic would let it through
        raise ValueError("should begin with no '~', or with that of a user who has a home") from None


def _address(schemes: tuple[str, ...], form: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        if not _is_address(value.get_secret_value(), schemes):
            raise ValueError(f"should be {form}")
        return value

    return AfterValidator(check)


def _is_address(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    places = parts.netloc.rpartition("@")[2].split(",")  # PostgreSQL takes several
    return parts.scheme in schemes and all(map(_is_place, places))


def _is_place(text: str) -> bool:
    found = re.fullmatch(r"(?:\[[^][]*\]|[^][:]*)(?::([0-9]{1,5}))?", text)
    return found is not None and int(found[1] or 0) <= 65535


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Name = Annotated[str, AfterValidator(_plain)]
Folder = Annotated[Path, AfterValidator(_expanded)]
PostgresUrl = Annotated[
    SecretStr, _address(("postgresql", "postgres"), "postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
]
RedisUrl = Annotated[SecretStr, _address(("redis", "rediss", "unix"), "redis://:PASSWORD@HOST:PORT/NUMBER")]


def usable_cpus(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPUs that this process may use: its affinity, cut by the quotas of its cgroups and of those above them."""
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), *_quotas(groups, mount))))


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    yield math.inf
    for line in _text(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        own = PurePosixPath(path.lstrip("/"))
        for folder in (own, *own.parents):  # in a container the own one is often the mount's root
            if not controllers:
                yield _quota(_text(mount / folder / "cpu.max"))
            elif "cpu" in controllers.split(","):
                files = (mount / "cpu" / folder / name for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
                yield _quota(" ".join(map(_text, files)))


def _quota(text: str) -> float:
    try:
        quota, period = map(int, text.split())
    except ValueError:  # "max", or no such file
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Settings(BaseSettings):
    """Every setting, named as in the environment (there in capitals)."""

    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, env_ignore_empty=True, hide_input_in_errors=True, validate_default=False
    )

    database_url: PostgresUrl | None = None
    postgres_host: str = "localhost"
    postgres_port: Port = 5432
    postgres_db: str = "rowlock"
    postgres_user: str = "rowlock"
    postgres_password: SecretStr | None = None

    redis_url: RedisUrl | None = None
    redis_host: str = "localhost"
    redis_port: Port = 6379
    redis_db: Annotated[int, Field(ge=0)] = 0
    redis_password: SecretStr | None = None

    api_host: str = "127.0.0.1"
    api_port: Port = 8000
    auth: Literal["", "none", "NONE"] = ""
    allowed_hosts: Words = ()

    node_name: Name = Field(default_factory=socket.gethostname)
    partitions: Annotated[tuple[Name, ...], NoDecode, BeforeValidator(_words), Field(min_length=1)] = ("default",)
    total_cpus: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default_factory=usable_cpus)
    worker_host: str = "127.0.0.1"
    worker_port: Port = 0
    worker_address: str | None = None

    data_dir: Folder = Path(".rowlock").absolute()
    job_work_base_dir: Folder | None = None
    script_dir: Folder | None = None
    allowed_roots: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_words)] = ()
    job_path: str = PATH_DEFAULT

    log_dir: Folder = Path("logs").absolute()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    heartbeat_seconds: Seconds = 5
    lease_seconds: Seconds = 30
    kill_grace_seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 30
    poll_seconds: Seconds = 1
    requeue_after: Seconds = 300
    end_jobs: bool = False
    unsafe: bool = False

    @property
    def work_base_dir(self) -> Path:
        """Where jobs have their own directories."""
        return self.job_work_base_dir or self.data_dir / "jobs"

    @property
    def scripts_dir(self) -> Path:
        """Where scripts of running jobs lie."""
        return self.script_dir or self.data_dir / "scripts"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders under which jobs may work and write."""
        return (self.work_base_dir, *self.allowed_roots)

    @property
    def postgres_dsn(self) -> str:
        """The address of PostgreSQL with its password: for asyncpg's eyes only."""
        if self.database_url:
            return self.database_url.get_secret_value()
        user, database = quote(self.postgres_user, safe=""), quote(self.postgres_db, safe="")
        secret = f":{quote(self.postgres_password.get_secret_value(), safe='')}" if self.postgres_password else ""
        if self.postgres_host.startswith("/"):
            return f"postgresql://{user}{secret}@/{database}?host={quote(self.postgres_host)}&port={self.postgres_port}"
        return f"postgresql://{user}{secret}@{_bracketed(self.postgres_host)}:{self.postgres_port}/{database}"

    @property
    def redis_dsn(self) -> str:
        """The address of Redis with its password: for redis-py's eyes only."""
        if self.redis_url:
            return self.redis_url.get_secret_value()
        secret = f":{quote(self.redis_password.get_secret_value(), safe='')}@" if self.redis_password else ""
        return f"redis://{secret}{_bracketed(self.redis_host)}:{self.redis_port}/{self.redis_db}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def without_secrets(url: str) -> str:
    """The address as it may be shown: no user, no password, no query but the socket's place."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    hosts = [word for word in parts.query.split("&") if word.startswith(("host=", "port="))]
    return f"{parts.scheme}://{place}{parts.path}" + (f"?{'&'.join(hosts)}" if hosts else "")


def settings_file(given: Path | None) -> Path | None:
    """The file that settings are read from: the one given, else the default where it exists."""
    if given is not None:
        if not given.is_file():
            raise SettingsError(f"--config: there is no file {given}")
        return given
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def load(file: Path | None = None) -> Settings:
    """Read the settings; raise SettingsError with a line per fault, naming key, value and what it should be."""
    path = settings_file(file)
    given = _given(path)
    try:
        settings = Settings(_env_file=path, _env_file_encoding="utf-8")  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("\n".join(_fault(fault, given) for fault in error.errors(include_url=False))) from None
    if settings.lease_seconds < 2 * settings.heartbeat_seconds:
        raise SettingsError(
            f"LEASE_SECONDS={settings.lease_seconds:g}: should be at least twice HEARTBEAT_SECONDS"
            f" ({settings.heartbeat_seconds:g}), or one late heartbeat takes the node down"
        )
    if settings.requeue_after < 2 * settings.lease_seconds:
        raise SettingsError(
            f"REQUEUE_AFTER={settings.requeue_after:g}: should be at least twice LEASE_SECONDS"
            f" ({settings.lease_seconds:g}), or a short silence ends jobs"
        )
    return settings


def obsolete(file: Path | None = None) -> str | None:
    """The warning for a setting of the old system that is still set, in the environment or in `file`."""
    if "worker_concurrency" in _given(file):
        return (
            "WORKER_CONCURRENCY is gone and is ignored: one worker runs all jobs of its node at once, TOTAL_CPUS"
            " says how many fit, and more nodes are more workers"
        )
    return None


def _given(file: Path | None) -> dict[str, str]:
    """What is set and not empty, as written, by its name in small letters."""
    sources = (_written(file) if file else {}, os.environ)  # the environment wins
    return {key.lower(): value for source in sources for key, value in source.items() if value}


def _written(file: Path) -> dict[str, str]:
    try:
        lines = list(parse_stream(StringIO(file.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    for line in lines:
        if line.error or (line.key is not None and line.value is None):  # not shown: it may hold a password
            raise SettingsError(f"{file}, line {line.original.line}: should be KEY=VALUE")
    return {line.key: line.value for line in lines if line.key is not None and line.value is not None}


def _fault(fault: Any, given: Mapping[str, str]) -> str:
    key = str(fault["loc"][0])
    value = given.get(key)
    return f"{key.upper()}{_shown(key, value)}: {re.sub('^.*?(?=should )', '', fault['msg'])}"


def _shown(key: str, value: str | None) -> str:
    if value is None:
        return ""
    if key.endswith(("_url", "_password")):
        return "=(not shown)"
    return f"={value if value.isprintable() else ascii(value)}"
