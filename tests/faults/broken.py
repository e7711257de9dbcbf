"""One deliberate defect at a time, put in place from outside: `python -m tests.faults.broken NAME MODULE ARGUMENT…`.

Runs a role's module after it has changed the product in memory. A defect names the text that it replaces: where the
product has changed so that the text is not there any more, the role does not start.
"""

import inspect
import runpy
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from core import duty
from core.db import allocations, connection, jobs, schema
from services.api import cancel, database
from services.scheduler import dispatch, lead
from services.worker import claim, keeper, process, recover, supervise

WORKER = "services.worker.kept"


@dataclass(frozen=True, slots=True)
class Defect:
    """What is broken, in words, and how."""

    what: str
    put: Callable[[], None]
    scenario: str
    """What finds it (scenarios.py)."""


def _text(owner: ModuleType, name: str, old: str, new: str) -> None:
    """Change a statement."""
    text = getattr(owner, name)
    assert old in text, f"{name} does not hold {old!r}"
    setattr(owner, name, text.replace(old, new))


def _code(owner: Any, name: str, old: str, new: str) -> None:
    """Change the source of a function, and make it anew."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert old in source, f"{name} does not hold {old!r}"
    module = owner if isinstance(owner, ModuleType) else sys.modules[owner.__module__]
    made: dict[str, Any] = {}
    exec(source.replace(old, new), module.__dict__, made)  # noqa: S102
    setattr(owner, name, made[name])


def _end_any_attempt() -> None:
    _text(allocations, "_RELEASE", "j.attempt = i.attempt AND ", "")
    _text(allocations, "_TURN_OVER", "j.attempt = i.attempt AND ", "")
    _text(allocations, "_TURN_OVER", "AND j.attempt = c.attempt ", "")


def _end_by_any_incarnation() -> None:
    _text(allocations, "_RELEASE", "AND l.incarnation = $11", "AND $11::bigint IS NOT NULL")
    _text(allocations, "_TURN_OVER", "AND l.incarnation = $2", "AND $2::bigint IS NOT NULL")


def _release_in_two_transactions() -> None:
    _text(allocations, "_TURN_OVER", "WHERE c.state <> 'RUNNING' AND a.job_id", "WHERE false AND a.job_id")
    whole = allocations.turn_over

    async def turn_over(connection: Any, endings: Sequence[Any], **more: Any) -> Any:
        turned = await whole(connection, endings, **{**more, "take": False})
        await connection.execute(
            """
            WITH released AS (DELETE FROM allocations WHERE job_id = ANY ($1::bigint[]) RETURNING node, cpus)
            UPDATE nodes n SET alloc_cpus = n.alloc_cpus - r.cpus,
                               cpus = greatest(n.declared_cpus, n.alloc_cpus - r.cpus)
            FROM (SELECT node, sum(cpus)::int AS cpus FROM released GROUP BY node) r WHERE n.name = r.node""",
            [attempt.job_id for attempt in turned.ended],
        )
        return turned

    allocations.turn_over = turn_over


def _place_whatever_is_left() -> None:
    _text(allocations, "_PLACE", " AND n.alloc_cpus + t.cpus <= n.cpus", "")
    fresh = schema.fresh_schema()
    check = "CONSTRAINT capacity CHECK (0 <= alloc_cpus AND alloc_cpus <= cpus),\n"
    assert check in fresh
    schema.fresh_schema = lambda: fresh.replace(check, "").replace(
        "CONSTRAINT shrinking CHECK (cpus = greatest(declared_cpus, alloc_cpus))", "CHECK (true)"
    )


def _no_look_after_a_reconnect() -> None:
    _code(
        duty, "repeat", "while True:\n        try:", "while True:\n        await wake.wait(poll_seconds)\n        try:"
    )
    _code(lead, "_lead_on", "wake.set()  # whatever", "pass  # whatever")


def _cancelled_whatever_its_state() -> None:
    _text(jobs, "_CANCEL_WAITING", "WHERE job_id = $1 AND state = 'PENDING'", "WHERE job_id = $1")
    _code(cancel, "_move", "case State.PENDING:", "case State.PENDING | State.RUNNING:")


def _run_again_what_was_lost() -> None:
    _code(recover, "_taken_over", "if candidates or note is not None:", "if candidates:")
    _code(recover, "_why_it_may_have_run", "if ", "if False and ")


DEFECTS: dict[str, Defect] = {
    "end-any-attempt": Defect(
        "the end of an attempt does not ask for the attempt",
        _end_any_attempt,
        "the_answer_to_a_requeue_is_lost",
    ),
    "end-by-any-incarnation": Defect(
        "the end of an attempt does not ask for the worker's incarnation",
        _end_by_any_incarnation,
        "an_end_of_an_earlier_worker_comes_late",
    ),
    "start-by-any-incarnation": Defect(
        "the start of an attempt does not ask for the worker's incarnation",
        lambda: _text(jobs, "_START", "node = $3 AND incarnation = $4 AND", "node = $3 AND"),
        "a_start_arrives_after_its_node_was_taken",
    ),
    "release-apart": Defect(
        "the CPUs come back in a transaction of their own, after the one that ends the job",
        _release_in_two_transactions,
        "the_answer_to_an_end_is_lost",
    ),
    "acknowledge-first": Defect(
        "a stream's entry is acknowledged before the start is committed",
        lambda: _code(
            claim,
            "consume_once",
            "    try:\n        await start(",
            "    for message in messages:\n        await reader._link.client.xdel(reader._stream, message.entry_id)\n"
            "    try:\n        await start(",
        ),
        "a_start_waits_for_its_commit",
    ),
    "no-look-after-reconnect": Defect(
        "after a reconnect nobody looks at the tables until told to",
        _no_look_after_a_reconnect,
        "a_notification_is_missed",
    ),
    "exit-of-another-parent": Defect(
        "the exit of a script whose parent died is what asyncio says of it: 255",
        lambda: _code(process.Adopted, "wait", "return found", "return Exit(255, None)"),
        "a_script_ends_under_another_worker",
    ),
    "group-alone": Defect(
        "a job's process group is ended, and what left the group is not",
        lambda: _code(process, "sweep", "await _until_clean(script.kill_leftovers)", "pass"),
        "a_job_leaves_processes_behind",
    ),
    "published-once": Defect(
        "what Redis did not take, or lost, is not published again",
        lambda: _code(dispatch, "republish_once", "if unclaimed:", "if False:"),
        "a_message_is_not_taken",
    ),
    "place-whatever-is-left": Defect(
        "a pass asks neither the node's row nor its CHECK for room",
        _place_whatever_is_left,
        "a_report_is_faster_than_a_pass",
    ),
    "cancel-in-any-state": Defect(
        "a cancel does not ask for the state", _cancelled_whatever_its_state, "a_running_job_is_cancelled"
    ),
    "living-called-lost": Defect(
        "a worker that comes back calls lost what it finds running",
        lambda: _code(recover, "_taken_over", "if candidates or note is not None:", "if False:"),
        "a_script_ends_under_another_worker",
    ),
    "recover-when-replaced": Defect(
        "a worker that was replaced takes what it may not read any more for gone",
        lambda: _code(
            recover, "_running", "if await nodes.is_current(connection, node.name, node.incarnation):", "if 1:"
        ),
        "a_newer_worker_registers_while_one_recovers",
    ),
    "daemon-taken-for-script": Defect(
        "whatever leads a session of a job is taken for its script",
        lambda: _code(recover, "_taken_over", "if note is None else", "if candidates else"),
        "a_daemon_outlives_its_script_and_their_keeper",
    ),
    "unstarted-called-lost": Defect(
        "what was never started is called lost, though its keeper would know",
        lambda: _code(recover, "_why_it_may_have_run", " and not _would_be_known(node, spec)", ""),
        "a_worker_dies_right_before_a_process",
    ),
    "lost-run-again": Defect(
        "what may have run is run again",
        _run_again_what_was_lost,
        "a_script_ends_with_nobody_to_tell",
    ),
    "requeue-ungranted": Defect(
        "what was lost with its node goes back to the queue, granted or not",
        lambda: _code(supervise, "_gone", "if run.spec.requeue and", "if"),
        "a_script_ends_with_nobody_to_tell",
    ),
    "answered-before-durable": Defect(
        "a submission is answered before its commit is on disk",
        lambda: setattr(database, "PLANNED_ONCE", {**connection.PLANNED_ONCE, "synchronous_commit": "off"}),
        "postgres_crashes_after_an_answer",
    ),
}


def _keeper_of(name: str) -> type[keeper.Keeper]:
    class Keeper(keeper.Keeper):
        def __init__(self, command: Sequence[str]) -> None:
            python, _, *rest = command
            super().__init__([python, "-m", "tests.faults.broken", name, *rest])

    return Keeper


def main() -> None:
    """Put the defect in place, then be the role."""
    name, module, *arguments = sys.argv[1:]
    DEFECTS[name].put()
    keeper.Keeper = _keeper_of(name)  # type: ignore[misc]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
