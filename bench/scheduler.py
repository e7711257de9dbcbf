"""The scheduler, whose passes are timed: `python -m bench.scheduler FILE`, with its settings in the environment.

Writes to FILE, as it ends, a line of JSON for each pass that found something: when it began, how many seconds it
took, how many of these for the statement that places (so long it holds its row locks), how many jobs it placed.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.worker import replace
from core.db import allocations
from core.db.connection import Connection, Line, Pool
from core.records import Dispatch, Placement
from services.scheduler import __main__ as scheduler
from services.scheduler import serve
from services.scheduler.allocate import allocate_once

_passes: list[tuple[float, float, float, int]] = []
_placing = 0.0
_place = allocations.place


async def timed_pass(database: Line | Pool, *hands: Callable[..., object]) -> list[Dispatch]:
    """Stands where `allocate_once` does."""
    global _placing
    began, _placing, steady = time.time(), 0.0, time.perf_counter()
    placed = await allocate_once(database, *hands)
    if _placing:
        _passes.append((began, time.perf_counter() - steady, _placing, len(placed)))
    return placed


async def timed_place(connection: Connection, placements: Sequence[Placement]) -> list[allocations.Placed]:
    """Stands where `place` does."""
    global _placing
    steady = time.perf_counter()
    placed = await _place(connection, placements)
    _placing = time.perf_counter() - steady
    return placed


def main() -> int:
    """The entry of `python -m bench.scheduler`."""
    replace(serve, "allocate_once", timed_pass)
    replace(allocations, "place", timed_place)
    code = scheduler.main([])
    Path(sys.argv[1]).write_text("".join(f"{json.dumps(each)}\n" for each in _passes))
    return code


if __name__ == "__main__":
    sys.exit(main())
