"""The command: look at everything at once, print a line for each check."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict

from core.settings import Settings
from services.cli.doctor import folders, node, postgres, redis
from services.cli.doctor.finding import Finding, fault

FAULTY = 1
LOOK_SECONDS = 5


async def doctor(settings: Settings, *, as_json: bool) -> int:
    """Print what is found; the exit code is 0 when no fault is among it. Nothing that is looked at is changed."""
    parts = await asyncio.gather(
        _looked("node", lambda: node.judge(node.look())),
        _looked("folders", lambda: [found for folder in folders.look(settings) for found in folders.judge(folder)]),
        postgres.examine(settings),
        redis.examine(settings),
    )
    found = [finding for part in parts for finding in part]
    print(_document(found) if as_json else "\n".join(map(str, found)))
    return FAULTY if _count(found, "fault") else 0


async def _looked(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What `look` finds, on a thread that nobody waits for in the end: a file system may hang."""
    answer: Future[list[Finding]] = Future()
    threading.Thread(target=_answer, args=(answer, look), daemon=True).start()
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await asyncio.shield(asyncio.wrap_future(answer))
    except TimeoutError:
        return [fault(what, f"no answer within {LOOK_SECONDS:g} s: a file system hangs", "one that answers")]
    except OSError as error:
        return [fault(what, f"cannot be looked at: {error}", "permission to")]


def _answer(answer: "Future[list[Finding]]", look: Callable[[], list[Finding]]) -> None:
    try:
        answer.set_result(look())
    except Exception as error:  # noqa: BLE001 - raised again where it is waited for
        answer.set_exception(error)


def _document(found: Sequence[Finding]) -> str:
    counts = {"faults": _count(found, "fault"), "warnings": _count(found, "warning")}
    return json.dumps({**counts, "findings": [asdict(finding) for finding in found]}, indent=2)


def _count(found: Sequence[Finding], verdict: str) -> int:
    return sum(finding.verdict == verdict for finding in found)
