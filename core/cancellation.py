"""Cancellation that may have been lost: what is awaited can swallow it, and a loop for ever would never end.

A task that has been asked to end keeps that in mind (`Task.cancelling`), whatever became of the CancelledError:

- the exits of asyncpg's transactions and pools talk to the server; an error of theirs takes its place,
- `wait_for`, which libraries send through, drops it when both come at once, before Python 3.12,
- a task group drops it when a member has failed as well, before Python 3.13.
"""

import asyncio


def raise_if_cancelled() -> None:
    """Raise CancelledError when this task has been asked to end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def pause(seconds: float) -> None:
    """Sleep before another try, unless this task has been asked to end."""
    raise_if_cancelled()
    await asyncio.sleep(seconds)
