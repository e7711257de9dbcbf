"""The life of a job: Slurm's state names and the one table of legal transitions.

``schema.sql`` ties ``end_time`` to the final states; the statements in ``core/db`` are compare-and-sets. A test
proves that the three agree over all pairs.
"""

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """A job's state, spelled as Slurm spells it (job_state_string in slurm/common/slurm_protocol_defs.c)."""

    PENDING = "PENDING"
    CONFIGURING = "CONFIGURING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    DEADLINE = "DEADLINE"
    PREEMPTED = "PREEMPTED"


class Reason(StrEnum):
    """Why a job waits or ended, with Slurm's codes (squeue(1), "JOB REASON CODES")."""

    NONE = "None"
    RESOURCES = "Resources"
    NON_ZERO_EXIT_CODE = "NonZeroExitCode"
    RAISED_SIGNAL = "RaisedSignal"
    TIME_LIMIT = "TimeLimit"
    JOB_LAUNCH_FAILURE = "JobLaunchFailure"
    SYSTEM_FAILURE = "SystemFailure"
    NODE_DOWN = "NodeDown"


FINAL: Final = frozenset(State) - {State.PENDING, State.CONFIGURING, State.RUNNING}

# PENDING again: from CONFIGURING because it provably never started, from RUNNING because a requeue was granted.
TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.PENDING: frozenset({State.CONFIGURING, State.CANCELLED, State.DEADLINE}),
    State.CONFIGURING: frozenset({State.RUNNING, State.PENDING, State.CANCELLED}),
    State.RUNNING: (FINAL | {State.PENDING}) - {State.DEADLINE},
    **{state: frozenset[State]() for state in FINAL},
}


def is_legal(before: State, after: State) -> bool:
    """Whether a job may go from `before` to `after`; final states absorb."""
    return after in TRANSITIONS[before]
