"""``Idempotency-Key``: what a client calls a submission, and whether two of them ask for the same job."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import fields

from aiohttp import web

from core.records import NewJob
from services.api.problems import Problem

HEADER = "Idempotency-Key"
REPLAY = "Idempotent-Replay"

KEY = re.compile(r"[!-~]{1,255}")
_FORM = b"\x01"
"""The version of the canonical form, in front of each digest."""


def key_of(request: web.Request) -> str | None:
    """The request's key, or None; Problem 400 for what can be none."""
    given = request.headers.getall(HEADER, [])
    if not given:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        raise Problem(400, f"{HEADER} should stand once, with 1 to 255 visible ASCII characters")
    return given[0]


def digest(asked: NewJob) -> bytes:
    """What tells a job from another, however its JSON was spelled. `asked` holds nothing that a setting filled in.

    What asks for nothing is left out, so that a field which comes in a later version changes no digest.
    """
    values = {field.name: getattr(asked, field.name) for field in fields(asked)}
    wishes = {name: value for name, value in values.items() if value}
    canonical = json.dumps(wishes, sort_keys=True, separators=(",", ":"))
    return _FORM + hashlib.sha256(canonical.encode()).digest()


def digest_of_list(digests: Sequence[bytes]) -> bytes:
    """What tells a list of jobs from another, and from each single job."""
    return _FORM + hashlib.sha256(b"list" + b"".join(digests)).digest()


def is_same(one: bytes, other: bytes) -> bool:
    """Whether two digests stand for the same job. Those of different versions cannot be told apart: the key decides."""
    return one == other or one[:1] != other[:1]
