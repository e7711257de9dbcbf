"""What the API refused, in the words of the command line."""

from collections.abc import Mapping
from typing import Any

from core.client import ClientError
from services.cli.client.arguments import job_options
from services.cli.client.terminal import complain

REFUSED = 1
AWAY = 75
"""EX_TEMPFAIL of sysexits.h: no exit code of anything else here."""


def tell(command: str, error: ClientError) -> int:
    """Say what was wrong, a line for each fault; the exit code for it."""
    for line in [_fault(fault) for fault in error.faults] or [str(error)]:
        complain(command, line)
    return AWAY if error.may_pass else REFUSED


def _fault(fault: Mapping[str, Any]) -> str:
    return f"{_where(fault)}: {fault.get('detail')}"


def _where(fault: Mapping[str, Any]) -> str:
    """The option that a parameter or a JSON pointer stands for."""
    if parameter := fault.get("parameter"):
        return f"--{parameter}"
    match str(fault.get("pointer") or "/request").split("/")[1:]:
        case ["job", field, *within]:
            return " ".join([job_options().get(field, field), *within])
        case ["reason"]:
            return "--reason"
        case words:
            return "/".join(words)
