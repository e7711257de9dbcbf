"""What the handlers share."""

import asyncio
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from redis.asyncio import Redis

from core.moves import Moves
from core.streams import Link
from core.wakeup import Wakeup
from services.api.call import Calls
from services.api.database import Database
from services.api.models import Site
from services.api.submit import Submitter
from services.api.watch import Watch


@dataclass(frozen=True, slots=True)
class State:
    """One API process."""

    site: Site
    database: Database
    submitter: Submitter
    redis: Redis
    link: Link
    calls: Calls
    workers: aiohttp.ClientSession
    watch: Watch
    moves: Moves
    wake: Wakeup
    """Set after a commit that the scheduler should hear of."""
    followers: set[asyncio.Task[object]]
    """Those who follow an output: they are cut off at the end."""
    large: asyncio.Semaphore
    """Held for each large list that is being read and stored."""


STATE = web.AppKey("state", State)


def of(request: web.Request) -> State:
    """The state of the process that answers."""
    return request.app[STATE]
