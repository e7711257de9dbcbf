"""``rowlock submit``: a script and its options become a job, as with sbatch."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from core.client import Client
from core.documents import JobDocument
from services.cli.client import directives
from services.cli.client.arguments import Misuse, job_options
from services.cli.client.environment import exported
from services.cli.client.terminal import complain, write_bytes

STDIN = "-"
LARGEST_SCRIPT = 1024 * 1024
"""The API takes no larger one."""
PATIENT_SECONDS = 2
"""Without an answer for so long, somebody wonders."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What is posted."""

    job: Mapping[str, Any]
    script: str


def read(options: argparse.Namespace) -> Submission:
    """The job that is asked for: a default, then the script's own lines, then the command line; or Misuse."""
    if options.follow and options.json:
        raise Misuse("--follow prints the output of the job: leave out --json")
    script = _read_script(options.file)
    asked = {name: value for name, value in vars(options).items() if name in job_options()}
    job = {**directives.read(script, options.file, ignore_unknown=options.ignore_unknown), **asked}
    if options.file != STDIN:
        job.setdefault("name", PurePath(options.file).name)
    if "environment" in job:
        try:
            job["environment"] = exported(job["environment"], os.environ)
        except ValueError as error:
            raise Misuse(f"--export: {error}") from None
    return Submission(job, script)


def _read_script(file: str) -> str:
    try:
        if file == STDIN:
            read = sys.stdin.buffer.read(LARGEST_SCRIPT + 1)
        else:
            with open(file, "rb") as opened:
                read = opened.read(LARGEST_SCRIPT + 1)
    except OSError as error:
        raise Misuse(f"{file}: {error.strerror or error}") from None
    if len(read) > LARGEST_SCRIPT:
        raise Misuse(f"{file}: a script is at most 1 MiB")
    try:
        return read.decode()
    except UnicodeError:
        raise Misuse(f"{file} is not UTF-8 text") from None


async def submit(client: Client, options: argparse.Namespace, submission: Submission) -> int:
    """Submit; with ``--wait`` or ``--follow`` the exit code is that of the job."""
    job = await _submitted(client, options.key, submission)
    waits = options.wait or options.follow
    if options.json and not waits:
        print(json.dumps(job))
    else:
        # Also beside a document or an output that comes later: whoever gives up waiting should know what for.
        apart = options.json or options.follow
        print(f"Submitted batch job {job['job_id']}", file=sys.stderr if apart else sys.stdout, flush=True)
    if not waits:
        return 0
    if options.follow:
        await write_bytes(client.follow(job["job_id"]))
    job = await client.wait(job["job_id"])
    if options.json:
        print(json.dumps(job))
    if job["state"] != "COMPLETED":
        complain("submit", f"job {job['job_id']}: {job['state']}{_why(job)}")
    return exit_code_of(job)


async def _submitted(client: Client, key: str | None, submission: Submission) -> JobDocument:
    """The job as stored. It may be sent again for long; who looks on is told."""
    loop = asyncio.get_running_loop()
    told = loop.call_later(PATIENT_SECONDS, complain, "submit", f"no answer from {client.address} yet, still trying")
    try:
        return await client.submit(submission.job, submission.script, key=key)
    finally:
        told.cancel()


def _why(job: JobDocument) -> str:
    found = [job["state_reason"] if job["state_reason"] != "None" else "", job["state_description"] or ""]
    return f" ({': '.join(filter(None, found))})" if any(found) else ""


def exit_code_of(job: JobDocument) -> int:
    """What a shell would answer for the script, but never 0 for a job that did not complete."""
    if job["state"] == "COMPLETED":
        return 0
    if job["signal"]:
        return 128 + signal_number(job["signal"])
    return job["exit_code"] or 1


def signal_number(name: str) -> int:
    """The number of a signal as the API names it: TERM, RTMIN+3, or the number itself where it has no name."""
    if name.startswith("RTMIN+"):
        return signal.SIGRTMIN + int(name.removeprefix("RTMIN+"))
    found = signal.Signals.__members__.get(f"SIG{name}")
    return int(name) if found is None else found.value
