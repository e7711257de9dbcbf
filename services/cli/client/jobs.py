"""Jobs: listed, looked at, read, cancelled."""

import argparse
import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from core.client import Client, ClientError
from core.documents import JobDocument, JobsDocument
from core.states import FINAL
from core.units import format_time_limit
from services.cli.client import refusal, terminal
from services.cli.client.arguments import Misuse
from services.cli.client.table import Table, show_fields

FILTERS = ("state", "account", "name", "node", "limit")
PAGE = 200
"""Jobs asked for at a time, where all are wanted."""


async def jobs(client: Client, options: argparse.Namespace) -> int:
    """``jobs``: one page, or all of them."""
    table = Table("JOBID", "PARTITION", "NAME", "ACCOUNT", "STATE", "TIME", "CPUS", "NODE", "EXIT", "REASON")
    async for page in _pages(client, options):
        if options.json:
            print(json.dumps(page))
        else:
            now = datetime.now(UTC)
            table.show([row(job, now) for job in page["jobs"]])
    if page["next_cursor"] is not None and not options.json:
        terminal.complain("jobs", "there are more: --all, or a larger --limit")
    return 0


async def _pages(client: Client, options: argparse.Namespace) -> AsyncIterator[JobsDocument]:
    given = {name: getattr(options, name) for name in FILTERS}
    query: dict[str, str | int] = {name: value for name, value in given.items() if value is not None}
    if not options.all:
        yield await client.jobs(**query)
        return
    async for page in client.pages(**query, limit=PAGE):
        yield page


def row(job: JobDocument, now: datetime) -> tuple[object, ...]:
    """The job in the table."""
    return (
        job["job_id"],
        job["partition"],
        job["name"],
        job["account"],
        job["state"],
        elapsed(job, now),
        job["cpus"],
        job["nodes"],
        job["exit_code"] if job["signal"] is None else job["signal"],
        None if job["state_reason"] == "None" else job["state_reason"],
    )


def elapsed(job: JobDocument, now: datetime) -> str | None:
    """How long it has run, or ran."""
    if job["start_time"] is None:
        return None
    end = now if job["end_time"] is None else _time(job["end_time"])
    # Two clocks may differ.
    return format_time_limit(max(0, (end - _time(job["start_time"])) // timedelta(seconds=1)))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def job(client: Client, options: argparse.Namespace) -> int:
    """``job``: every field of one."""
    show(await client.job(options.job_id), as_json=options.json)
    return 0


def show(document: Mapping[str, object], *, as_json: bool) -> None:
    """One document as it is, or a line for each of its fields."""
    if as_json:
        print(json.dumps(document))
    else:
        show_fields(document.items())


async def script(client: Client, options: argparse.Namespace) -> int:
    """``script``: as submitted."""
    terminal.write_text(await client.script(options.job_id))
    return 0


async def logs(client: Client, options: argparse.Namespace) -> int:
    """``logs``: as far as written, or until the job is over."""
    stream: Literal["stdout", "stderr"] = "stderr" if options.stderr else "stdout"
    if not options.follow:
        await terminal.write_bytes(client.output(options.job_id, stream, attempt=options.attempt, tail=options.tail))
        return 0
    if options.attempt is not None or options.tail is not None:
        raise Misuse("--follow shows the whole output: leave out --attempt and --tail")
    await terminal.write_bytes(client.follow(options.job_id, stream))
    return 0


async def cancel(client: Client, options: argparse.Namespace) -> int:
    """``cancel``: each of them, whatever became of those before; the exit code is that of the last failure."""
    code = 0
    for job_id in options.job_ids:
        try:
            cancelled = await client.cancel(job_id)
        except ClientError as error:
            code = refusal.tell("cancel", error)
            continue
        if options.json:
            print(json.dumps(cancelled))
        else:
            print(f"job {job_id}: {cancelled['state']}{'' if cancelled['state'] in FINAL else ', is being ended'}")
    return code
