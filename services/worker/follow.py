"""Following an output: its bytes as they are written, until nothing of its attempt is left to write any."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from core.records import Attempt

if TYPE_CHECKING:  # a node has a file server, which follows
    from services.worker.node import Run

Runs = Mapping[Attempt, "Run"]

POLL_SECONDS = 0.1
"""A line is with its reader in twice that."""
CHUNK = 32 * 1024


async def begun(attempt: Attempt, runs: Runs, is_running: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the files of an attempt are its own, or it is over: before, they may hold what an earlier job wrote.

    One that the tables call running (`is_running` asks), and that is not among the node's runs, is about to be.
    """
    while (run := runs.get(attempt)) is None or (run.script is None and not run.over):
        if run is None and not await is_running():
            return
        await asyncio.sleep(POLL_SECONDS)


async def pieces(
    open_file: Callable[[], int], at: int, is_over: Callable[[], bool], own: Callable[[int], Awaitable[range]]
) -> AsyncGenerator[bytes, None]:
    """The bytes of a file from `at` on, none of more than CHUNK, and an empty one for each look that found nothing.

    Once the attempt is over, `own` tells which are its own of so many as there are then: a later attempt writes there
    next, and has said before from where. Raises FileRefused and OSError.
    """
    descriptor: int | None = None
    stop: int | None = None
    try:
        while True:
            over = is_over()  # before the read: what was written until then is read
            if descriptor is None:
                with suppress(FileNotFoundError):
                    descriptor = open_file()
            if over and stop is None:
                stop = (await own(0 if descriptor is None else os.fstat(descriptor).st_size)).stop
            wanted = CHUNK if stop is None else min(CHUNK, max(0, stop - at))
            piece = b"" if descriptor is None else os.pread(descriptor, wanted, at)
            if not piece and over:
                return
            at += len(piece)
            yield piece
            if not piece:
                await asyncio.sleep(POLL_SECONDS)
    finally:
        if descriptor is not None:
            os.close(descriptor)
