"""The query of ``GET /jobs``: order, filters, and cursors that fit no other query."""

import base64
import binascii
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from multidict import MultiMapping

from core.db.jobs import Filter
from core.documents import JobDocument
from core.records import Job
from core.states import FINAL, State
from services.api.problems import Fault, unprocessable

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
MAX_WAIT_SECONDS = 60
MOST_OFFSET = 2**62
"""Of what is followed: no file is so long, and no sum of two such is refused by the kernel."""
PARAMETERS = frozenset(
    {"order", "state", "account", "name", "node", "submitted_after", "submitted_before", "limit", "cursor", "fields"}
)

# A plus sign in a query is a blank to its reader: take that back for a time's offset.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?)([Zz]|[-+ ]\d\d:\d\d)", re.ASCII)


_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(s|ms)?", re.ASCII)


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
    """Reads parameters one by one and collects what is wrong with them."""

    def __init__(self, query: MultiMapping[str]) -> None:
        self._query = query
        self.faults: list[Fault] = []

    def check_names(self, known: frozenset[str], several: frozenset[str] = frozenset()) -> None:
        for name in dict.fromkeys(self._query):
            if name not in known:
                self.fault(name[:100], "unknown parameter")
            elif name not in several and len(self._query.getall(name)) > 1:
                self.fault(name, "should be given once")

    def fault(self, parameter: str, detail: str) -> None:
        self.faults.append(Fault(detail, parameter=parameter.encode(errors="replace").decode()))

    def text(self, name: str) -> str | None:
        value = self._query.get(name)
        if value is not None and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            self.fault(name, "should be text without control characters")
            return None
        return value

    def number(self, name: str, least: int, most: int) -> int | None:
        value = self._query.get(name)
        if value is None:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", value, re.ASCII) or not least <= int(value) <= most:
            self.fault(name, f"should be a number from {least} to {most}")
            return None
        return int(value)

    def duration(self, name: str, most: int) -> float | None:
        value = self._query.get(name)
        if value is None:
            return None
        found = _DURATION.fullmatch(value)
        seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else most + 1
        if seconds > most:
            self.fault(name, f"should be a time of at most {most} seconds, such as 10s or 500ms")
            return None
        return seconds

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._query.get(name, choices[0])
        if value not in choices:
            self.fault(name, f"should be {' or '.join(choices)}")
            return choices[0]
        return value

    def time(self, name: str) -> datetime | None:
        value = self._query.get(name)
        if value is None:
            return None
        found = _TIME.fullmatch(value)
        try:
            if found:
                offset = found[2].upper().replace(" ", "+").replace("Z", "+00:00")
                return datetime.fromisoformat(found[1].upper() + offset).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        self.fault(name, "should be an RFC 3339 time with its offset, such as 2026-01-31T12:00:00Z")
        return None

    def several(self, name: str, choices: Iterable[str]) -> frozenset[str] | None:
        """Words with commas between them; None where there are none."""
        words = {word.strip() for value in self._query.getall(name, []) for word in value.split(",")}
        known = words.intersection(choices)
        if len(known) < len(words):
            self.fault(name, f"should be among {', '.join(choices)}")
        return frozenset(known) if words else None

    def states(self, name: str) -> tuple[State, ...] | None:
        found = self.several(name, State.__members__)
        return None if found is None else tuple(sorted(map(State, found)))

    def fields(self) -> frozenset[str] | None:
        return self.several("fields", JobDocument.__annotations__)


def read(query: MultiMapping[str]) -> Listing:
    """The listing that a query asks for, or Problem 422 with everything that is wrong with it."""
    reader = _Reader(query)
    reader.check_names(PARAMETERS, several=frozenset({"state", "fields"}))
    listing = Listing(
        wanted=Filter(
            states=reader.states("state"),
            account=reader.text("account"),
            name=reader.text("name"),
            node=reader.text("node"),
            submitted_after=reader.time("submitted_after"),
            submitted_before=reader.time("submitted_before"),
        ),
        newest_first=reader.choice("order", ("newest", "oldest")) == "newest",
        limit=reader.number("limit", 1, MAX_LIMIT) or DEFAULT_LIMIT,
        after=None,
        fields=reader.fields(),
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


_UNTIL = {"final": FINAL, "running": FINAL | {State.RUNNING}}


def read_patience(query: MultiMapping[str]) -> Patience:
    """What a query wants to wait for, or Problem 422; without ``wait``, nothing."""
    reader = _Reader(query)
    reader.check_names(frozenset({"wait", "until", "fields"}), several=frozenset({"fields"}))
    patience = Patience(
        seconds=reader.duration("wait", MAX_WAIT_SECONDS) or 0,
        until=_UNTIL[reader.choice("until", tuple(_UNTIL))],
        fields=reader.fields(),
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
    reader = _Reader(query)
    reader.check_names(frozenset({"stream", "attempt", "offset", "tail", "follow"}))
    excerpt = Excerpt(
        stream=reader.choice("stream", ("stdout", "stderr")),
        attempt=reader.number("attempt", 1, 2**31 - 1),
        offset=reader.number("offset", 0, 2**63 - 1),
        tail=reader.number("tail", 0, 2**63 - 1),
        follow=reader.choice("follow", ("false", "true")) == "true",
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
