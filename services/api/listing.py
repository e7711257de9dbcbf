"""Queries: each parameter is declared once; order, filters, and cursors that fit no other query."""

import base64
import binascii
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from multidict import MultiMapping

from core.db.jobs import Filter
from core.documents import JobDocument
from core.records import Job
from core.states import FINAL, State
from services.api.models import NO_CONTROLS
from services.api.problems import Fault, unprocessable

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
MAX_WAIT_SECONDS = 60
MOST_OFFSET = 2**62
"""Of what is followed: no file is so long, and no sum of two such is refused by the kernel."""

# A plus sign in a query is a blank to its reader: take that back for a time's offset.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?)([Zz]|[-+ ]\d\d:\d\d)", re.ASCII)
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(s|ms)?", re.ASCII)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parameter(Generic[T]):
    """One parameter of a query, for its reader and for the API's document alike."""

    name: str
    says: str
    schema: Mapping[str, Any]
    """JSON Schema of the text, or of what it stands for."""
    parse: Callable[[str], T]
    """What a text stands for; raises ValueError that says what would be right."""
    several: bool = False
    """May stand several times, and hold several texts with commas between them."""


def _choice(name: str, says: str, choices: tuple[str, ...]) -> Parameter[str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"should be {' or '.join(choices)}")
        return text

    return Parameter(name, says, {"type": "string", "enum": list(choices), "default": choices[0]}, parse)


def _number(name: str, says: str, least: int, most: int, **more: Any) -> Parameter[int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError(f"should be a number from {least} to {most}")
        return int(text)

    return Parameter(name, says, {"type": "integer", "minimum": least, "maximum": most, **more}, parse)


def _text(name: str, says: str) -> Parameter[str]:
    def parse(text: str) -> str:
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
            raise ValueError("should be text without control characters")
        return text

    return Parameter(name, says, {"type": "string", "pattern": NO_CONTROLS}, parse)


def _time(name: str, says: str) -> Parameter[datetime]:
    def parse(text: str) -> datetime:
        found = _TIME.fullmatch(text)
        try:
            if found:
                offset = found[2].upper().replace(" ", "+").replace("Z", "+00:00")
                return datetime.fromisoformat(found[1].upper() + offset).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise ValueError("should be an RFC 3339 time with its offset, such as 2026-01-31T12:00:00Z")

    return Parameter(name, says, {"type": "string", "format": "date-time"}, parse)


def _duration(name: str, says: str, most: int) -> Parameter[float]:
    def parse(text: str) -> float:
        found = _DURATION.fullmatch(text)
        seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else most + 1
        if seconds > most:
            raise ValueError(f"should be a time of at most {most} seconds, such as 10s or 500ms")
        return seconds

    return Parameter(name, says, {"type": "string", "pattern": f"^{_DURATION.pattern}$"}, parse)


def _some(name: str, says: str, choices: Iterable[str]) -> Parameter[str]:
    known = tuple(choices)

    def parse(text: str) -> str:
        if text.strip() not in known:
            raise ValueError(f"should be among {', '.join(known)}")
        return text.strip()

    return Parameter(name, says, {"type": "string", "enum": list(known)}, parse, several=True)


ORDER = _choice("order", "Of submission.", ("newest", "oldest"))
STATE = _some("state", "Jobs in one of these states.", State.__members__)
ACCOUNT = _text("account", "Jobs of this account.")
NAME = _text("name", "Jobs of this name.")
NODE = _text("node", "Jobs that this node has, or had last.")
SUBMITTED_AFTER = _time("submitted_after", "Jobs submitted after that.")
SUBMITTED_BEFORE = _time("submitted_before", "Jobs submitted before that.")
LIMIT = _number("limit", "Jobs on a page.", 1, MAX_LIMIT, default=DEFAULT_LIMIT)
CURSOR = _text("cursor", "Where the page begins: `next_cursor` of the one before. Keep order and filters.")
FIELDS = _some("fields", "These fields of a job alone.", JobDocument.__annotations__)
PAGE: tuple[Parameter[Any], ...] = (
    ORDER, STATE, ACCOUNT, NAME, NODE, SUBMITTED_AFTER, SUBMITTED_BEFORE, LIMIT, CURSOR, FIELDS,
)  # fmt: skip

_UNTIL = {"final": FINAL, "running": FINAL | {State.RUNNING}}
WAIT = _duration("wait", f"How long the answer may wait for `until`: at most {MAX_WAIT_SECONDS} s.", MAX_WAIT_SECONDS)
UNTIL = _choice("until", "Until the job is over, or has started; needs `wait`.", tuple(_UNTIL))
PATIENCE: tuple[Parameter[Any], ...] = (WAIT, UNTIL, FIELDS)

STREAM = _choice("stream", "Which output.", ("stdout", "stderr"))
ATTEMPT = _number("attempt", "The bytes of this attempt alone; nothing, when it never started.", 1, 2**31 - 1)
OFFSET = _number("offset", "Bytes to skip.", 0, 2**63 - 1)
TAIL = _number("tail", "The last so many bytes; excludes `offset`, and both a Range header.", 0, 2**63 - 1)
FOLLOW = _choice("follow", "Whether to go on as server-sent events until the output is complete.", ("false", "true"))
EXCERPT: tuple[Parameter[Any], ...] = (STREAM, ATTEMPT, OFFSET, TAIL, FOLLOW)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a client wants to see: `after` is the job that its last page ended with."""

    wanted: Filter
    newest_first: bool
    limit: int
    after: int | None
    fields: frozenset[str] | None
    """Of each job; None: all."""

    @property
    def fingerprint(self) -> str:
        """Of everything that makes this query another one; the limit does not."""
        text = repr((self.newest_first, self.wanted))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cursor_behind(self, job: Job) -> str:
        """Where the next page begins."""
        document = json.dumps({"q": self.fingerprint, "j": job.job_id}, separators=(",", ":"))
        return base64.urlsafe_b64encode(document.encode()).decode().rstrip("=")


class _Reader:
    """Reads the parameters of a query one by one and collects what is wrong with them."""

    def __init__(self, query: MultiMapping[str], known: Iterable[Parameter[Any]]) -> None:
        self._query = query
        self.faults: list[Fault] = []
        several = {parameter.name: parameter.several for parameter in known}
        for name in dict.fromkeys(query):
            if name not in several:
                self.fault(name[:100], "unknown parameter")
            elif not several[name] and len(query.getall(name)) > 1:
                self.fault(name, "should be given once")

    def fault(self, parameter: str, detail: str) -> None:
        self.faults.append(Fault(detail, parameter=parameter.encode(errors="replace").decode()))

    def one(self, parameter: Parameter[T]) -> T | None:
        """What is given, if it is, and is right."""
        text = self._query.get(parameter.name)
        return None if text is None else self._parsed(parameter, [text])[0]

    def choice(self, parameter: Parameter[str]) -> str:
        """What is given, or the default."""
        return self.one(parameter) or str(parameter.schema["default"])

    def several(self, parameter: Parameter[T]) -> list[T]:
        """All that are given, if they are right."""
        values = self._query.getall(parameter.name, [])
        found = self._parsed(parameter, [text for value in values for text in value.split(",")])
        return [value for value in found if value is not None]

    def _parsed(self, parameter: Parameter[T], texts: Sequence[str]) -> list[T | None]:
        try:
            return [parameter.parse(text) for text in texts]
        except ValueError as error:
            self.fault(parameter.name, str(error))
            return [None]


def read(query: MultiMapping[str]) -> Listing:
    """The listing that a query asks for, or Problem 422 with everything that is wrong with it."""
    reader = _Reader(query, PAGE)
    listing = Listing(
        wanted=Filter(
            states=tuple(sorted({State(word) for word in reader.several(STATE)})) or None,
            account=reader.one(ACCOUNT),
            name=reader.one(NAME),
            node=reader.one(NODE),
            submitted_after=reader.one(SUBMITTED_AFTER),
            submitted_before=reader.one(SUBMITTED_BEFORE),
        ),
        newest_first=reader.choice(ORDER) == "newest",
        limit=reader.one(LIMIT) or DEFAULT_LIMIT,
        after=None,
        fields=frozenset(reader.several(FIELDS)) or None,
    )
    after = _after(reader, query.get("cursor"), listing)
    if reader.faults:
        raise unprocessable(reader.faults)
    return replace(listing, after=after)


def _after(reader: _Reader, cursor: str | None, listing: Listing) -> int | None:
    if cursor is None or reader.faults:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        document = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        fingerprint, job_id = document["q"], document["j"]
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
        reader.fault("cursor", "is no cursor of this API")
        return None
    if type(job_id) is not int or not 0 < job_id < 2**63:
        reader.fault("cursor", "is no cursor of this API")
        return None
    if fingerprint != listing.fingerprint:
        reader.fault("cursor", "belongs to another query: keep order and filters from page to page")
        return None
    return job_id


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long ``GET /jobs/{job_id}`` waits, for what, and what is answered."""

    seconds: float
    until: frozenset[State]
    fields: frozenset[str] | None


def read_patience(query: MultiMapping[str]) -> Patience:
    """What a query wants to wait for, or Problem 422; without ``wait``, nothing."""
    reader = _Reader(query, PATIENCE)
    patience = Patience(
        seconds=reader.one(WAIT) or 0,
        until=_UNTIL[reader.choice(UNTIL)],
        fields=frozenset(reader.several(FIELDS)) or None,
    )
    if "until" in query and "wait" not in query:
        reader.fault("until", "needs wait, such as wait=10s")
    if reader.faults:
        raise unprocessable(reader.faults)
    return patience


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Which part of which output ``GET …/logs`` asks for."""

    stream: str
    attempt: int | None
    """Whose bytes alone; None: the whole output."""
    offset: int | None
    tail: int | None
    follow: bool
    """Whether the answer goes on until the output is complete."""


def read_excerpt(query: MultiMapping[str], *, ranged: bool) -> Excerpt:
    """The part asked for, or Problem 422; `ranged` says that a Range header asks for one as well."""
    reader = _Reader(query, EXCERPT)
    excerpt = Excerpt(
        stream=reader.choice(STREAM),
        attempt=reader.one(ATTEMPT),
        offset=reader.one(OFFSET),
        tail=reader.one(TAIL),
        follow=reader.choice(FOLLOW) == "true",
    )
    if "offset" in query and "tail" in query:
        reader.fault("tail", "excludes offset")
    if ranged and ("offset" in query or "tail" in query):
        reader.fault("offset" if "offset" in query else "tail", "excludes a Range header")
    if excerpt.follow and (excerpt.offset or 0) > MOST_OFFSET:
        reader.fault("offset", f"should be a number from 0 to {MOST_OFFSET}")
    if ranged and excerpt.follow:
        reader.fault("follow", "excludes a Range header: go on by Last-Event-ID or offset")
    if reader.faults:
        raise unprocessable(reader.faults)
    return excerpt
