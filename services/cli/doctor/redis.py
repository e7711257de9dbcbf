"""What the Redis is, and what it does when it is full. Losing what it holds costs time, never a job."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from core import streams
from core.settings import Settings, without_secrets
from services.cli.doctor.finding import Finding, fault, ok, warning

OLDEST = (6, 2)
ROUND_TRIPS = 5
FAR_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Server:
    """What INFO says, and how long a round trip takes in seconds. Memory is bytes; a limit of 0 is none."""

    name: str
    version: str
    used_memory: int
    maxmemory: int
    maxmemory_policy: str
    round_trip: float


async def examine(settings: Settings) -> list[Finding]:
    """Every finding; that it cannot be reached is the only one then."""
    client = streams.connect(settings)
    address = without_secrets(settings.redis_dsn)
    try:
        async with asyncio.timeout(streams.ANSWER_SECONDS):
            return judge(_server(await client.info(), await _round_trip(client)))
    except streams.REDIS_ERRORS as error:
        detail = f"{address}: {' '.join(str(error).split()) or type(error).__name__}"
        return [fault("Redis", detail, "one that is up; without it jobs start up to a second later")]
    finally:
        with suppress(*streams.REDIS_ERRORS):
            await client.aclose()


def _server(info: Mapping[str, Any], round_trip: float) -> Server:
    valkey = info.get("valkey_version")
    return Server(
        name="Valkey" if valkey else "Redis",
        version=str(valkey or info["redis_version"]),
        used_memory=info["used_memory"],
        maxmemory=info.get("maxmemory", 0),
        maxmemory_policy=info.get("maxmemory_policy", "noeviction"),
        round_trip=round_trip,
    )


async def _round_trip(client: Redis) -> float:
    """The shortest of a few."""
    took = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        await client.ping()
        took.append(time.perf_counter() - began)
    return min(took)


def judge(server: Server) -> list[Finding]:
    """What is to be said of it."""
    return [_version(server), _memory(server), _distance(server)]


def _version(server: Server) -> Finding:
    named = f"{server.name} {server.version}"
    new = server.name == "Valkey" or tuple(map(int, server.version.split(".")[:2])) >= OLDEST
    return ok("Redis", named) if new else fault("Redis", named, "Redis 6.2 or later, or Valkey")


def _memory(server: Server) -> Finding:
    what = "maxmemory-policy"
    if server.maxmemory and server.maxmemory_policy.startswith("allkeys"):
        return warning(
            what,
            f"{server.maxmemory_policy}: when it is full, streams are thrown away; their jobs start all the same, up to"
            " a second later",
            "noeviction",
        )
    if server.maxmemory and server.used_memory >= server.maxmemory:
        return warning(what, f"{server.maxmemory_policy}, and it is full: jobs start up to a second later", "more room")
    limit = f"of {server.maxmemory // 2**20} MiB" if server.maxmemory else "no limit"
    return ok(what, f"{server.maxmemory_policy}, {server.used_memory // 2**20} MiB used, {limit}")


def _distance(server: Server) -> Finding:
    what, milliseconds = "Redis's distance", f"{server.round_trip * 1000:.1f} ms a round trip"
    if server.round_trip < FAR_SECONDS:
        return ok(what, milliseconds)
    return warning(what, f"{milliseconds}: each start waits so long", "a nearer one")
