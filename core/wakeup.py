"""A coalescing wake-up: it carries no meaning, whoever wakes reads the tables."""

import asyncio

from core.cancellation import raise_if_cancelled


class Wakeup:
    """Many `set()` calls while nobody waits are one wake-up."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake the waiter, or let the next wait return at once."""
        self._event.set()

    async def wait(self, poll_seconds: float) -> bool:
        """Wait for a wake-up or for the poll, whichever comes first; True when it was a wake-up."""
        raise_if_cancelled()
        try:
            async with asyncio.timeout(poll_seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        finally:
            self._event.clear()
        return True
