"""Batch by what has piled up: no timers, one job alone waits for nobody."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from core.cancellation import raise_if_cancelled

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Hands everything that arrived while the last batch was in flight to `work`, at most `limit` at a time.

    `work` answers in the order of its items: a result, or an exception that is raised to that item's caller alone.
    An exception that `work` itself raises reaches every caller of that batch.
    """

    def __init__(self, work: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._queue: list[tuple[T, asyncio.Future[R]]] = []
        self._arrived = asyncio.Event()

    async def do(self, item: T) -> R:
        """Queue `item` and wait for its own result."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Work batch after batch until cancelled; what is queued then is told so."""
        try:
            while True:
                await self._arrived.wait()
                batch, self._queue = self._queue[: self._limit], self._queue[self._limit :]
                if not self._queue:
                    self._arrived.clear()
                await self._settle(batch)
                raise_if_cancelled()
        finally:
            for _, future in self._queue:
                future.cancel()

    async def _settle(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - raised again in every caller
            results = [error] * len(batch)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
