"""``rowlock health ROLE``: whether this host's api, scheduler or worker does its duty, for container health checks.

A process that is there proves little, so each role is asked for what only a working one does: the API answers, the
scheduler has spoken to PostgreSQL a moment ago (its leader probes, its stand-by asks for the lock), the worker
prolongs the lease of its node.
"""

import socket
import sys
from dataclasses import dataclass

import asyncpg

from core.address import http_address
from core.client import Client
from core.db import nodes
from core.db.connection import application_name
from core.errors import RowlockError
from core.settings import Settings
from services.cli.database import connected

ANSWER_SECONDS = 5
SILENT_SECONDS = 15


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a role is well, and the line that says so."""

    well: bool
    line: str


async def health(settings: Settings, role: str) -> int:
    """Print one line; the exit code is 0 for well, 1 for anything else."""
    try:
        found = await _health(settings, role)
    except RowlockError as error:
        found = Health(False, str(error))
    print(f"{role}: {found.line}", file=sys.stdout if found.well else sys.stderr)
    return 0 if found.well else 1


async def _health(settings: Settings, role: str) -> Health:
    if role == "api":
        return await _api(settings)
    async with connected(settings, "health", statement_seconds=ANSWER_SECONDS) as connection:
        return await (_scheduler(connection) if role == "scheduler" else _worker(connection, settings))


async def _api(settings: Settings) -> Health:
    # By this address, not the machine's name: its Host is one that the API always goes by.
    address = http_address(settings.api_host, settings.api_port)
    async with Client(address, timeout_seconds=ANSWER_SECONDS) as client:
        await client.health()
    return Health(True, f"answers at {address}")


_SILENCE = """
SELECT extract(epoch FROM clock_timestamp() - max(state_change))::float8 FROM pg_stat_activity
WHERE datname = current_database() AND application_name = $1
"""


async def _scheduler(connection: asyncpg.Connection) -> Health:
    silence: float | None = await connection.fetchval(_SILENCE, application_name("scheduler"))
    if silence is None:
        return Health(False, "no scheduler of this host is connected to PostgreSQL")
    if silence > SILENT_SECONDS:
        return Health(False, f"the scheduler of this host has been silent for {silence:.0f} s")
    return Health(True, "is connected to PostgreSQL and at work")


async def _worker(connection: asyncpg.Connection, settings: Settings) -> Health:
    host = socket.gethostname()
    found = await nodes.all_nodes(connection, settings.node_name)
    if not found:
        return Health(False, f"node {settings.node_name} is not registered")
    node = found[0]
    if not node.alive:
        return Health(False, f"node {node.name}: its lease is over")
    if node.hostname != host:
        return Health(False, f"node {node.name} is held by a worker on {node.hostname}, this is {host}")
    return Health(True, f"node {node.name} is registered and its lease is alive")
