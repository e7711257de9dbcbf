"""The loop around a duty: wait for a wake-up or the poll, do it until nothing is left, survive a lost server."""

from collections.abc import Awaitable, Callable

import structlog

from core.cancellation import pause, raise_if_cancelled
from core.db.connection import CONNECTION_ERRORS, describe
from core.streams import REDIS_ERRORS
from core.wakeup import Wakeup

AWAY_ERRORS = (*CONNECTION_ERRORS, *REDIS_ERRORS)
NEVER = 3600.0
"""The poll of a duty that only its wake-up calls."""
BACK_OFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


async def repeat(name: str, once: Callable[[], Awaitable[int]], wake: Wakeup, poll_seconds: float) -> None:
    """Do `once` at each wake-up and at least every `poll_seconds`; again at once while it answers more than 0.

    Only here an error is caught, and only one that says that a server is away; everything is read again afterwards.
    """
    log = structlog.get_logger()
    failures = 0
    while True:
        try:
            while await once():
                raise_if_cancelled()
        except AWAY_ERRORS as error:
            if failures == 0:
                log.warning("duty_waits", duty=name, error=describe(error))
            await pause(BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)])
            failures += 1
            continue
        if failures:
            log.info("duty_resumed", duty=name)
            failures = 0
        await wake.wait(poll_seconds)
