"""``rowlock audit``: every broken invariant of the live database, with the rows that break it."""

import itertools
import json
from collections.abc import Sequence

from core.db import audit as invariants
from core.db import schema
from core.db.audit import INVARIANTS, Broken
from core.settings import Settings
from services.cli.database import connected

BROKEN = 1


async def audit(settings: Settings, *, as_json: bool) -> int:
    """Print what is broken; the exit code is 0 when nothing is."""
    async with connected(settings, "audit") as connection:
        await schema.check(connection)
        broken = await invariants.audit(connection)
    print(_document(broken) if as_json else _text(broken))
    return BROKEN if broken else 0


def _document(broken: Sequence[Broken]) -> str:
    rows = [{"invariant": fault.invariant, "row": fault.row} for fault in broken]
    return json.dumps({"invariants": len(INVARIANTS), "broken": rows}, indent=2, default=str)


def _text(broken: Sequence[Broken]) -> str:
    if not broken:
        return f"nothing is broken: all {len(INVARIANTS)} invariants hold"
    lines = []
    for invariant, faults in itertools.groupby(broken, lambda fault: fault.invariant):
        lines.append(f"BROKEN {invariant}")
        lines += ["  " + " ".join(f"{name}={value}" for name, value in fault.row.items()) for fault in faults]
    return "\n".join(lines)
