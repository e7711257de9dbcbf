"""One call of the API, or a few, for one command."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from core.client import Client, ClientError
from core.errors import SettingsError
from services.cli.client import jobs, nodes, refusal, submit
from services.cli.client.address import address_of
from services.cli.client.terminal import shown

Call = Callable[[Client], Awaitable[int]]

CALLS: dict[str, Callable[[Client, argparse.Namespace], Awaitable[int]]] = {
    "jobs": jobs.jobs,
    "job": jobs.job,
    "script": jobs.script,
    "logs": jobs.logs,
    "cancel": jobs.cancel,
    "nodes": nodes.nodes,
    "node": nodes.node,
    "drain": nodes.change,
    "resume": nodes.change,
    "down": nodes.change,
}


def run(options: argparse.Namespace) -> int:
    """The exit code of a command; what the API refuses is told."""
    _check_text(options)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for a locale that is not UTF-8
    address = address_of(options.url)
    call = _call(options)
    try:
        return asyncio.run(_called(address, call))
    except ClientError as error:
        return refusal.tell(options.command, error)


def _call(options: argparse.Namespace) -> Call:
    if options.command == "submit":
        # Before there is a loop, in which Ctrl-C would not end a read.
        submission = submit.read(options)
        return lambda client: submit.submit(client, options, submission)
    return lambda client: CALLS[options.command](client, options)


async def _called(address: str, call: Call) -> int:
    async with Client(address) as client:
        return await call(client)


def _check_text(options: argparse.Namespace) -> None:
    """Bytes of the command line that are no text can be told to no API."""
    for value in vars(options).values():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise SettingsError(f"rowlock {options.command}: {shown(value)} should be UTF-8 text")
