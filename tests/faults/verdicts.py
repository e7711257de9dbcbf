"""What the evidence of a run is held against: one function for each promise, each the witness of every break of it.

All are pure functions of an Evidence, at a time when nothing is under way any more.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from core.records import Attempt
from core.states import FINAL, State, is_legal
from tests.faults import ledger
from tests.faults.evidence import Evidence, Row, Sent
from tests.faults.ledger import Line

Check = Callable[[Evidence], Iterator[str]]

_FINAL = frozenset(state.value for state in FINAL)
_ENDED_BY_US = frozenset({"CANCELLED", "TIMEOUT", "NODE_FAIL"})
_ENDS_WE_GIVE = frozenset({"TERM", "KILL"})
CLOCK_SECONDS = 0.05
"""What two clocks that were read one after the other may differ by, and a limit may be early."""


def refused(found: Evidence) -> Iterator[str]:
    """What is right is accepted, sooner or later."""
    for sent in found.sent:
        if sent.refused is not None:
            yield f"{sent.name} was refused: {sent.refused}"


def missing(found: Evidence) -> Iterator[str]:
    """Accepted is durable: what was answered with 2xx is there, as it was sent."""
    for sent, job_id in _accepted(found):
        row = found.rows.get(job_id)
        if row is None:
            yield f"job {job_id} ({sent.name}) was accepted, and is not there"
        elif (row.name, row.script, row.cpus) != (sent.name, sent.wanted.script, sent.wanted.cpus):
            yield f"job {job_id} ({sent.name}) is not what was sent"
        elif (row.requeue, row.time_limit_seconds) != (sent.wanted.requeue, sent.wanted.time_limit_seconds):
            yield f"job {job_id} ({sent.name}) may be requeued, or is limited, otherwise than was sent"


def unended(found: Evidence) -> Iterator[str]:
    """Every job ends."""
    for row in found.rows.values():
        if not row.final:
            yield f"job {row.job_id} ({row.name}) is {row.state} for ever"


def not_run(found: Evidence) -> Iterator[str]:
    """What is said to have ended in some way has been started."""
    started = {line.attempt for line in found.lines if line.word == "start"}
    for row in found.rows.values():
        ran = row.exit_code is not None or row.signal is not None
        if row.final and ran and Attempt(row.job_id, row.attempt) not in started and not _may_end_unheard(row):
            yield f"job {row.job_id} ({row.name}) is {row.state} and has never been started"


def called_lost(found: Evidence) -> Iterator[str]:
    """A job is lost with its node, and only then."""
    times = _times_of(found)
    for row in found.rows.values():
        attempt = Attempt(row.job_id, row.attempt)
        if row.state == "NODE_FAIL" and not _was_lost(found, attempt, row.node, *times[attempt]):
            yield f"job {row.job_id} ({row.name}) is NODE_FAIL, and node {row.node} lost nothing then"
    started = {line.attempt for line in found.lines if line.word == "start"}
    for event in found.events:
        gone = event.before == "RUNNING" and event.after == "PENDING" and event.attempt in started
        if gone and not _was_lost(found, event.attempt, event.node, *times[event.attempt]):
            yield f"job {event.attempt.job_id} was requeued, and node {event.node} lost nothing then"


def doubled(found: Evidence) -> Iterator[str]:
    """One start for an attempt, one attempt at a time, and a second one only where that was granted."""
    released = _released(found)
    spoken = ledger.by_attempt(found.lines)
    starts: dict[int, list[Line]] = {}
    for attempt, lines in spoken.items():
        begun = [line for line in lines if line.word == "start"]
        if len(begun) > 1:
            yield f"job {attempt.job_id}, attempt {attempt.attempt}: started {len(begun)} times"
        starts.setdefault(attempt.job_id, []).extend(begun[:1])
    for job_id, begun in starts.items():
        begun.sort(key=lambda line: line.attempt.attempt)
        row = found.rows.get(job_id)
        if len(begun) > 1 and row is not None and not row.requeue:
            yield f"job {job_id}: run {len(begun)} times, and nobody granted that"
        for first, second in pairwise(begun):
            over = min((line.at for line in spoken[first.attempt] if line.word == "end"), default=None)
            if over is not None and over > second.at:
                yield f"job {job_id}: attempt {second.attempt.attempt} was started before the one before it had ended"
            if over is None and released.get(first.attempt, 0) > second.time + CLOCK_SECONDS:
                yield f"job {job_id}: attempt {second.attempt.attempt} was started while the one before it was running"


def one_key_one_job(found: Evidence) -> Iterator[str]:
    """One key, one job, whatever was sent again."""
    names: dict[str, set[int]] = {}
    for row in found.rows.values():
        names.setdefault(row.name, set()).add(row.job_id)
    for sent in found.sent:
        if len(jobs := sent.job_ids | names.get(sent.name, set())) > 1:
            yield f"{sent.name} was sent with one key, and became jobs {', '.join(map(str, sorted(jobs)))}"


def wrong_exits(found: Evidence) -> Iterator[str]:
    """The exit code or the signal is the one that happened."""
    ends = {line.attempt: line.details for line in found.lines if line.word == "end"}
    for row in found.rows.values():
        if row.exit_code is None and row.signal is None:
            if row.state in ("COMPLETED", "TIMEOUT", "FAILED"):
                yield f"job {row.job_id} ({row.name}) is {row.state} without an exit"
            continue
        happened = ends.get(Attempt(row.job_id, row.attempt))
        told = ("exit", str(row.exit_code)) if row.exit_code is not None else ("signal", str(row.signal))
        # One that was being ended may have been hit by our signal before it wrote its end, and after it.
        by_us = row.state in _ENDED_BY_US and row.signal in _ENDS_WE_GIVE
        if told != happened and not by_us:
            yield f"job {row.job_id} ({row.name}) ended with {happened}, and {told} is told"
        if row.state in ("COMPLETED", "FAILED") and (row.state == "COMPLETED") != (told == ("exit", "0")):
            yield f"job {row.job_id} ({row.name}) is {row.state} with {told}"


def over_allocated(found: Evidence) -> Iterator[str]:
    """No CPU is given twice: by the database at every look, and by the scripts that ran at the same time."""
    if found.over:
        yield f"{found.over} CPUs over a node's own were allocated at one look"
    held = ledger.most_held(ledger.lives(found.lines, _released(found)))
    for node, most in held.items():
        if most > found.cpus[node]:
            yield f"scripts held {most} CPUs of node {node} at once, which has {found.cpus[node]}"


def orphans(found: Evidence) -> Iterator[str]:
    """Nothing of a job is left when its CPUs are back."""
    for seen in found.sightings:
        yield f"process {seen.pid} of {seen.name} was alive when its job was over"


def final_is_left(found: Evidence) -> Iterator[str]:
    """One final state, the same whenever and wherever it is read, and every move a legal one of the attempt at hand."""
    for sent, job_id in _accepted(found):
        seen = {*sent.ends, *([found.rows[job_id].end] if job_id in found.rows and sent.ends else [])}
        if len(seen) > 1:
            yield f"job {job_id} ({sent.name}) has ended as {' and as '.join(map(str, sorted(seen, key=str)))}"
    state: dict[int, tuple[str | None, int]] = {}
    for event in found.events:
        before, attempt = state.get(event.attempt.job_id, (None, 0))
        due = attempt + (event.before == "PENDING" and event.after == "CONFIGURING")
        if event.before != before or event.attempt.attempt != due:
            yield f"job {event.attempt.job_id}: from {before} of attempt {attempt} by {event}"
        elif before is not None and not is_legal(State(before), State(event.after)):
            yield f"job {event.attempt.job_id}: {before} to {event.after}"
        state[event.attempt.job_id] = (event.after, event.attempt.attempt)


def cancelled_starts(found: Evidence) -> Iterator[str]:
    """What was cancelled before it started never starts, and what was cancelled later is not started again."""
    for sent in found.sent:
        for cancel in sent.cancels:
            for line in found.lines:
                later = line.word == "start" and line.attempt.job_id in sent.job_ids and line.at >= cancel.at
                if later and (cancel.state in _FINAL or line.attempt.attempt > cancel.attempt):
                    yield f"job {line.attempt.job_id} ({sent.name}) was {cancel.state} by a cancel, and started later"


def logs(found: Evidence) -> Iterator[str]:
    """What is kept and served is what was written: whole, or up to where the attempt was ended; attempts in order."""
    whole = _whole(found)
    nodes: dict[int, set[str | None]] = {}
    for event in found.events:
        if event.after == "RUNNING":
            nodes.setdefault(event.attempt.job_id, set()).add(event.node)
    for sent, job_id in _accepted(found):
        kept = found.outputs.get(job_id)
        if kept is not None and not _are_outputs(kept, sent, sorted(whole.get(job_id, {}).items())):
            yield f"job {job_id} ({sent.name}): its output is not what it wrote ({len(kept)} bytes)"
        if sent.output is None or kept is None or sent.output == kept:
            continue
        # Of a job that ran on several nodes, what lies on the last one is served, which was written last.
        if len(nodes.get(job_id, ())) < 2 or not kept.endswith(sent.output):
            yield f"job {job_id} ({sent.name}): {len(sent.output)} bytes were served of {len(kept)}"


def parts(found: Evidence) -> Iterator[str]:
    """What is served of an attempt alone is what that one wrote; of the last one all of it."""
    whole = _whole(found)
    for sent, job_id in _accepted(found):
        for attempt, alone in sent.alone.items():
            wrote = sent.wanted.output(attempt)
            to_its_end = attempt == max(sent.alone) and whole.get(job_id, {}).get(attempt, False)
            if alone is not None and (alone != wrote if to_its_end else not wrote.startswith(alone)):
                yield f"job {job_id} ({sent.name}): attempt {attempt} wrote something else than its {len(alone)} bytes"


def _whole(found: Evidence) -> dict[int, dict[int, bool]]:
    """The attempts that spoke, of each job, and whether each came to its own end with all that it had to write."""
    spoken: dict[int, dict[int, bool]] = {}
    for attempt, lines in ledger.by_attempt(found.lines).items():
        whole = {"end"} == {line.word for line in lines} & {"end", "short"}
        spoken.setdefault(attempt.job_id, {})[attempt.attempt] = whole
    return spoken


def _are_outputs(kept: bytes, sent: Sent, attempts: Iterable[tuple[int, bool]]) -> bool:
    """Whether it is the outputs of these attempts one after another, each whole if it came to its own end."""
    for number, (attempt, whole) in enumerate(attempts):
        wrote = sent.wanted.output(attempt)
        end = f"{sent.name} {attempt} ".encode()
        own = kept[: _prefix(kept, wrote)] if not whole else kept[: len(wrote)]
        if (whole and own != wrote) or (wrote and number and own and not own.startswith(end)):
            return False
        kept = kept[len(own) :]
    return not kept


def _prefix(kept: bytes, wrote: bytes) -> int:
    """How many bytes the two have in common at their beginning."""
    pairs = enumerate(zip(kept, wrote, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(kept), len(wrote)))


def too_early(found: Evidence) -> Iterator[str]:
    """A time limit ends nothing before its time."""
    released = _released(found)
    started = {line.attempt: line.time for line in found.lines if line.word == "start"}
    for row in found.rows.values():
        attempt = Attempt(row.job_id, row.attempt)
        if row.state == "TIMEOUT" and attempt in started and attempt in released:
            ran = released[attempt] - started[attempt]
            # The worker's clock runs from the process's start, in ticks; the script speaks a moment later.
            if ran < (row.time_limit_seconds or 0) - 4 * CLOCK_SECONDS:
                yield f"job {row.job_id} ({row.name}) was ended after {ran:.2f} of its {row.time_limit_seconds} s"


def given_in_silence(found: Evidence) -> Iterator[str]:
    """A node whose lease is over is given nothing."""
    for event in found.events:
        for silence in found.silences:
            if (
                event.after == "CONFIGURING"
                and event.node == silence.node
                and silence.began < event.time < silence.ended
            ):
                yield f"job {event.attempt.job_id} was given to node {event.node}, which was silent"


def surprises(found: Evidence) -> Iterator[str]:
    """A role ends when it is ended."""
    yield from found.surprises


def audited(found: Evidence) -> Iterator[str]:
    """What `rowlock audit` finds."""
    for broken in found.audited:
        yield f"{broken.invariant}: {broken.row}"


COLUMNS: dict[str, tuple[Check, ...]] = {
    "lost": (refused, missing, unended, not_run, called_lost),
    "doubled": (doubled, one_key_one_job),
    "wrong exit codes": (wrong_exits,),
    "CPUs over-allocated": (over_allocated,),
    "orphans left": (orphans,),
    "other invariants broken": (
        final_is_left,
        cancelled_starts,
        logs,
        parts,
        too_early,
        given_in_silence,
        surprises,
        audited,
    ),
}
"""The table's columns, and what counts in each."""


def judge(found: Evidence) -> dict[str, list[str]]:
    """Every break of every promise, by column."""
    return {column: [text for check in checks for text in check(found)] for column, checks in COLUMNS.items()}


def _accepted(found: Evidence) -> Iterator[tuple[Sent, int]]:
    return ((sent, job_id) for sent in found.sent for job_id in sorted(sent.job_ids))


def _may_end_unheard(row: Row) -> bool:
    """A script that was ended as it began may not have come to its first line."""
    return row.state in _ENDED_BY_US and row.signal in _ENDS_WE_GIVE


def _released(found: Evidence) -> dict[Attempt, float]:
    """When the CPUs of each attempt that ran came back."""
    return {event.attempt: event.time for event in found.events if event.before == "RUNNING"}


def _times_of(found: Evidence) -> dict[Attempt, tuple[float, float]]:
    """From the allocation of each attempt to its end."""
    began = {event.attempt: event.time for event in found.events if event.after == "CONFIGURING"}
    ended = _released(found)
    return {attempt: (time, ended.get(attempt, float("inf"))) for attempt, time in began.items()}


def _was_lost(found: Evidence, attempt: Attempt, node: str | None, began: float, ended: float) -> bool:
    return any(
        loss.node == node and began <= loss.ended and loss.began <= ended
        for loss in found.losses
        if loss.attempts is None or attempt in loss.attempts
    )
