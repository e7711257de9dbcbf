"""Each check of the verdicts can fail: on histories made by hand, one wrong thing in each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from core.db.audit import Broken
from core.records import Attempt
from tests.faults import ledger, verdicts
from tests.faults.evidence import Cancel, Event, Evidence, Loss, Row, Sent, Sighting, Silence
from tests.faults.jobs import Wanted, sleeps

FIRST, SECOND = Attempt(1, 1), Attempt(1, 2)
WANTED = Wanted("one", sleeps(1, "leave 3"), cpus=2, lines=2)
OUTPUT = b"one 1 0\none 1 1\n"
LEDGER = """\
start 1 1 40 10.5 n1 2
end 1 1 40 11.5 n1 exit 3
"""


def events(*moves: tuple[Attempt, str | None, str, float], node: str = "n1") -> list[Event]:
    return [Event(attempt, before, after, node, time) for attempt, before, after, time in moves]


ROW = Row(1, "one", "FAILED", 1, 0, False, 2, "n1", 3, None, None, True, WANTED.script)
PLACED = (
    (Attempt(1, 0), None, "PENDING", 9.0),
    (FIRST, "PENDING", "CONFIGURING", 10.0),
    (FIRST, "CONFIGURING", "RUNNING", 10.4),
)
GOOD = Evidence(
    sent=[Sent(WANTED, {1}, ends=[("FAILED", 3, None)], output=OUTPUT, alone={1: OUTPUT})],
    lines=ledger.parse(LEDGER),
    rows={1: ROW},
    events=events(*PLACED, (FIRST, "RUNNING", "FAILED", 11.6)),
    cpus={"n1": 4},
    outputs={1: OUTPUT},
)

# One that may be requeued, lost its first attempt with its node, and ended by itself in the second.
AGAIN = Evidence(
    sent=[
        Sent(
            replace(WANTED, requeue=True),
            {1},
            ends=[("FAILED", 3, None)],
            alone={1: b"one 1 0\none 1", 2: b"one 2 0\none 2 1\n"},
        )
    ],
    lines=ledger.parse("start 1 1 40 10.5 n1 2\nstart 1 2 60 12.5 n1 2\nend 1 2 60 13.5 n1 exit 3\n"),
    rows={1: replace(ROW, attempt=2, restart_cnt=1, requeue=True)},
    events=events(
        *PLACED,
        (FIRST, "RUNNING", "PENDING", 11.6),
        (SECOND, "PENDING", "CONFIGURING", 12.0),
        (SECOND, "CONFIGURING", "RUNNING", 12.4),
        (SECOND, "RUNNING", "FAILED", 13.6),
    ),
    cpus={"n1": 2},
    outputs={1: b"one 1 0\none 1one 2 0\none 2 1\n"},
    losses=[Loss("n1", 11.0, 11.2)],
)


# The same on two nodes: of its output, what lies on the second is served.
ELSEWHERE = replace(
    AGAIN,
    sent=[replace(AGAIN.sent[0], output=b"one 2 0\none 2 1\n")],
    events=[replace(event, node="n2") if event.attempt == SECOND else event for event in AGAIN.events],
)


def row(found: Evidence, **changes: Any) -> Evidence:
    return replace(found, rows={1: replace(found.rows[1], **changes)})


def said(found: Evidence, text: str) -> Evidence:
    return replace(found, lines=ledger.parse(text))


def sent(found: Evidence, **changes: Any) -> Evidence:
    return replace(found, sent=[replace(found.sent[0], **changes)])


def moved(found: Evidence, *moves: tuple[Attempt, str | None, str, float]) -> Evidence:
    return replace(found, events=events(*moves))


Spoil = Callable[[Evidence], Evidence]


def limited(found: Evidence) -> Evidence:
    """Ended after 1.1 s by a limit of two."""
    unread = sent(found, wanted=replace(WANTED, time_limit_seconds=2), ends=[])
    return row(unread, state="TIMEOUT", exit_code=None, signal="TERM", time_limit_seconds=2)


BROKEN: list[tuple[str, str, Spoil]] = [
    ("lost", "is not there", lambda e: replace(e, rows={})),
    ("lost", "not what was sent", lambda e: row(e, script="#!/bin/sh\n")),
    ("lost", "not what was sent", lambda e: row(e, cpus=1)),
    ("lost", "otherwise than was sent", lambda e: row(e, requeue=True)),
    ("lost", "for ever", lambda e: row(e, state="RUNNING", final=False, exit_code=None)),
    ("lost", "never been started", lambda e: said(e, "")),
    ("lost", "lost nothing then", lambda e: row(e, state="NODE_FAIL", exit_code=None)),
    ("lost", "lost nothing then", lambda e: replace(row(e, state="NODE_FAIL"), losses=[Loss("n1", 12.0, 13.0)])),
    ("lost", "lost nothing then", lambda e: replace(row(e, state="NODE_FAIL"), losses=[Loss("n2", 9.0, 13.0)])),
    (
        "lost",
        "lost nothing then",
        lambda e: replace(row(e, state="NODE_FAIL"), losses=[Loss("n1", 9.0, 13.0, frozenset({SECOND}))]),
    ),
    ("doubled", "started 2 times", lambda e: said(e, LEDGER + "start 1 1 41 10.6 n1 2\n")),
    ("doubled", "nobody granted", lambda e: said(e, LEDGER + "start 1 2 41 12.6 n1 2\n")),
    ("doubled", "became jobs 1, 2", lambda e: replace(e, rows={**e.rows, 2: replace(ROW, job_id=2)})),
    ("doubled", "became jobs 1, 2", lambda e: sent(e, job_ids={1, 2})),
    ("wrong exit codes", "('exit', '255') is told", lambda e: row(e, exit_code=255)),
    ("wrong exit codes", "('signal', 'KILL') is told", lambda e: row(e, exit_code=None, signal="KILL")),
    ("wrong exit codes", "('exit', '3') is told", lambda e: said(e, LEDGER.replace("exit 3", "signal KILL"))),
    ("wrong exit codes", "ended with None", lambda e: said(e, LEDGER.splitlines(keepends=True)[0])),
    ("wrong exit codes", "('signal', 'TERM') is told", lambda e: row(
        said(e, LEDGER.splitlines(keepends=True)[0]), exit_code=None, signal="TERM")),
    ("wrong exit codes", "without an exit", lambda e: row(e, exit_code=None)),
    ("wrong exit codes", "is COMPLETED with", lambda e: row(e, state="COMPLETED")),
    ("wrong exit codes", "is FAILED with", lambda e: said(row(e, exit_code=0), LEDGER.replace("exit 3", "exit 0"))),
    ("CPUs over-allocated", "3 CPUs over", lambda e: replace(e, over=3)),
    ("CPUs over-allocated", "held 6 CPUs of node n1", lambda e: said(e, LEDGER + "start 2 1 50 11.4 n1 4\n")),
    ("orphans left", "process 77 of one", lambda e: replace(e, sightings=[Sighting("one", 77)])),
    ("other invariants broken", "has ended as", lambda e: sent(e, ends=[("COMPLETED", 0, None), ("FAILED", 3, None)])),
    ("other invariants broken", "has ended as", lambda e: sent(e, ends=[("COMPLETED", 0, None)])),
    (
        "other invariants broken",
        "FAILED of attempt 1",
        lambda e: moved(
            e, *PLACED, (FIRST, "RUNNING", "FAILED", 11.6), (FIRST, "RUNNING", "COMPLETED", 11.7)
        ),
    ),
    ("other invariants broken", "of attempt 1 by", lambda e: moved(e, *PLACED, (SECOND, "RUNNING", "FAILED", 11.6))),
    ("other invariants broken", "PENDING to RUNNING", lambda e: moved(
        e, PLACED[0], (PLACED[0][0], "PENDING", "RUNNING", 1))),
    ("other invariants broken", "CANCELLED by a cancel", lambda e: sent(e, cancels=[Cancel("CANCELLED", 0, 0)])),
    ("other invariants broken", "RUNNING by a cancel", lambda e: sent(e, cancels=[Cancel("RUNNING", 0, 0)])),
    ("other invariants broken", "not what it wrote", lambda e: replace(e, outputs={1: OUTPUT[:-1]})),
    ("other invariants broken", "not what it wrote", lambda e: replace(e, outputs={1: OUTPUT + b"x"})),
    ("other invariants broken", "were served of", lambda e: sent(e, output=OUTPUT[:-1])),
    ("other invariants broken", "attempt 1 wrote something else", lambda e: sent(e, alone={1: OUTPUT[:-1]})),
    ("other invariants broken", "of its 2 s", limited),
    ("other invariants broken", "was silent", lambda e: replace(e, silences=[Silence("n1", 9.5, 10.1)])),
    ("other invariants broken", "api-0", lambda e: replace(e, surprises=["api-0 ended with exit code 1"])),
    ("lost", "was refused", lambda e: sent(e, refused="422 no")),
    ("other invariants broken", "capacity", lambda e: replace(e, audited=[Broken("capacity", {"name": "n1"})])),
]  # fmt: skip

BROKEN_AGAIN: list[tuple[str, str, Spoil]] = [
    ("lost", "was requeued", lambda e: replace(e, losses=[])),
    ("doubled", "before the one before it had ended", lambda e: said(
        e, "start 1 1 40 10.5 n1 1\nstart 1 2 60 12.5 n1 1\nend 1 1 40 12.6 n1 exit 3\nend 1 2 60 13.5 n1 exit 3\n")),
    ("doubled", "while the one before it was running", lambda e: replace(
        e, events=[replace(v, time=12.9) if v.after == "PENDING" and v.before else v for v in e.events])),
    ("other invariants broken", "not what it wrote", lambda e: replace(e, outputs={1: b"one 2 0\none 2 1\none 1 0\n"})),
    ("other invariants broken", "not what it wrote", lambda e: replace(e, outputs={1: b"one 1 0\none 1one 2 0\n"})),
    ("other invariants broken", "attempt 1 wrote something else", lambda e: sent(
        e, alone={1: b"one 1 0\none 1one 2 0\n", 2: b"one 2 0\none 2 1\n"})),
    ("other invariants broken", "were served of", lambda e: sent(e, output=b"one 2 0\none 2 1\n")),
    ("other invariants broken", "attempt 2 wrote something else", lambda e: sent(e, alone={1: b"", 2: b"one 2 0\n"})),
    ("other invariants broken", "RUNNING by a cancel", lambda e: sent(e, cancels=[Cancel("RUNNING", 1, 5)])),
]  # fmt: skip


@pytest.mark.parametrize("good", [GOOD, AGAIN, ELSEWHERE], ids=["once", "again", "elsewhere"])
def test_nothing_is_found_where_nothing_is_wrong(good: Evidence) -> None:
    assert {column: found for column, found in verdicts.judge(good).items() if found} == {}


@pytest.mark.parametrize(
    ("good", "column", "text", "spoil"),
    [(GOOD, *broken) for broken in BROKEN] + [(AGAIN, *broken) for broken in BROKEN_AGAIN],
    ids=[f"{number}-{broken[1]}" for number, broken in enumerate((*BROKEN, *BROKEN_AGAIN))],
)
def test_what_is_wrong_is_found(good: Evidence, column: str, text: str, spoil: Spoil) -> None:
    found = verdicts.judge(spoil(good))
    assert any(text in broken for broken in found[column]), found


def test_every_check_is_seen_to_fail() -> None:
    failed = {
        check
        for good, table in ((GOOD, BROKEN), (AGAIN, BROKEN_AGAIN))
        for _, _, spoil in table
        for checks in verdicts.COLUMNS.values()
        for check in checks
        if list(check(spoil(good)))
    }
    assert failed == {check for checks in verdicts.COLUMNS.values() for check in checks}


MAY_BE: list[tuple[str, Spoil]] = [
    ("hit by our signal before it wrote its end", lambda e: row(
        said(sent(e, ends=[]), LEDGER.splitlines(keepends=True)[0]), state="CANCELLED", exit_code=None, signal="TERM")),
    ("hit after it wrote its end", lambda e: row(sent(e, ends=[]), state="CANCELLED", exit_code=None, signal="KILL")),
    ("ended by our signal before its first line", lambda e: row(
        replace(said(e, ""), outputs={}, sent=[Sent(WANTED, {1})]), state="CANCELLED", exit_code=None, signal="TERM")),
    ("a cancel that came when it ran", lambda e: sent(e, cancels=[Cancel("RUNNING", 1, 5)])),
    ("never started, and cancelled", lambda e: row(
        replace(e, lines=[], outputs={1: b""}, sent=[Sent(WANTED, {1}, cancels=[Cancel("CANCELLED", 0, 0)])],
                events=events(PLACED[0], (Attempt(1, 0), "PENDING", "CANCELLED", 9.5))),
        state="CANCELLED", attempt=0, exit_code=None, node=None)),
    ("in the database alone: its answer was lost", lambda e: sent(e, job_ids=set(), ends=[], output=None)),
    ("not there, and never accepted", lambda e: replace(
        sent(e, job_ids=set(), ends=[], output=None), rows={}, lines=[], events=[], outputs={})),
    ("lost with its node", lambda e: replace(
        row(said(sent(e, ends=[]), LEDGER.splitlines(keepends=True)[0]), state="NODE_FAIL", exit_code=None),
        losses=[Loss("n1", 11.0, 11.1)], outputs={1: OUTPUT[:5]}, sent=[Sent(WANTED, {1})])),
    ("no room for its output, as it said itself", lambda e: replace(
        said(sent(e, output=None), LEDGER.replace("end", "short 1 1 40 11.0 n1\nend")), outputs={1: OUTPUT[:9]})),
    ("one after the other on one CPU", lambda e: replace(
        said(e, LEDGER + "start 2 1 50 11.5 n1 4\n"), cpus={"n1": 4})),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change"), MAY_BE, ids=[what for what, _ in MAY_BE])
def test_what_may_happen_is_not_called_wrong(what: str, change: Spoil) -> None:
    assert {column: found for column, found in verdicts.judge(change(GOOD)).items() if found} == {}


def test_a_line_that_was_cut_short_is_no_line() -> None:
    whole = ledger.parse(LEDGER)
    assert ledger.parse(LEDGER + "start 2 1 5") == ledger.parse(LEDGER + "start 2 1 5 6.0 n1 1") == whole
    assert [line.at for line in whole] == [0, LEDGER.index("end")]
