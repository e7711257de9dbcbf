"""The jobs of a run: what each does, and so what may be seen of it afterwards."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

PRELUDE = """#!/bin/bash
exec 2> /dev/null  # where bash itself would tell of signals
say() {
    local word=$1 mark=${ROWLOCK_JOB%:*}
    shift
    printf '%s %s %s %s %s %s\\n' "$word" "${mark/:/ }" $$ "$EPOCHREALTIME" "$SLURMD_NODENAME" "$*" >> "$LEDGER"
}
leave() { say end "exit $1"; exit "$1"; }
fall() { say end "signal $1"; kill -s "$1" $$; sleep 1000; }
say start "$SLURM_CPUS_ON_NODE"
"""
LINE = "{name} {attempt} {number}"
SIGNALS = ("KILL", "TERM", "HUP", "SEGV", "USR1", "ABRT")
GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job that a client wants. Its `name` is its own; the script's processes bear it where their mark is gone."""

    name: str
    body: str
    cpus: int = 1
    requeue: bool = False
    time_limit_seconds: int | None = None
    lines: int = 0
    """How many lines its script writes to its output, before it ends by itself."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def script(self) -> str:
        """The text as submitted."""
        line = f'echo "{self.name} ${{attempt}} $i" || {{ say short; break; }}'
        printed = f"for ((i = 0; i < {self.lines}; i++)); do {line}; done\n"
        attempt = "attempt=${ROWLOCK_JOB#*:} attempt=${attempt%%:*}\n"
        return PRELUDE + (attempt + printed if self.lines else "") + self.body

    def document(self, ledger: str) -> dict[str, Any]:
        """The `job` of a submission."""
        found: dict[str, Any] = {
            "name": self.name,
            "account": "chaos",
            "cpus_per_task": self.cpus,
            "requeue": self.requeue,
            "environment": {"LEDGER": ledger, **self.environment},
        }
        if self.time_limit_seconds is not None:
            found["time_limit"] = self.time_limit_seconds / 60
        return found

    def output(self, attempt: int) -> bytes:
        """What one attempt writes to its output when nothing ends it before."""
        lines = (LINE.format(name=self.name, attempt=attempt, number=number) for number in range(self.lines))
        return "".join(f"{line}\n" for line in lines).encode()


def sleeps(seconds: float, then: str = "leave 0") -> str:
    """A body: sleep, and end."""
    return f"sleep {seconds:.2f}\n{then}\n"


def traps(seconds: float, code: int = 3) -> str:
    """A body that answers SIGTERM with an exit of its own, soon."""
    return f"trap 'leave {code}' TERM\nfor ((t = 0; t < {seconds * 20:.0f}; t++)); do sleep 0.05; done\nleave 0\n"


def leaves_behind(name: str, then: str = "leave 0") -> str:
    """A body that leaves a process without session, group and environment of the job's."""
    return (
        f"env -i setsid bash -c 'exec -a {name} sleep 1000' < /dev/null > /dev/null 2>&1 &\n"
        f"say child $!\n(exec -a {name} sleep 1000) &\nsay child $!\nsleep 0.2\n{then}\n"
    )


def unmarked(body: str) -> str:
    """A body that runs without its job's mark in the environment, as if on another machine."""
    return (
        'exec env -i PATH="$PATH" LEDGER="$LEDGER" SLURMD_NODENAME="$SLURMD_NODENAME" WHOSE="$ROWLOCK_JOB" bash -c "'
        f"$(declare -f say leave fall)\"$'\\nROWLOCK_JOB=$WHOSE\\n'{shlex.quote(body)}\n"
    )


Make = Callable[[str, Random], Wanted]


def _quick(name: str, luck: Random) -> Wanted:
    return Wanted(name, sleeps(luck.uniform(0, 0.5)), cpus=luck.choice((1, 1, 2, 3)))


def _long(name: str, luck: Random) -> Wanted:
    return Wanted(name, sleeps(luck.uniform(2, 12), f"leave {luck.choice((0, 0, 1, 77))}"), requeue=luck.random() < 0.2)


def _exits(name: str, luck: Random) -> Wanted:
    code = luck.choice((1, 2, 126, 127, 128, 137, 143, 254, 255, luck.randrange(256)))
    return Wanted(name, sleeps(luck.uniform(0, 1.5), f"leave {code}"), cpus=luck.choice((1, 2)))


def _falls(name: str, luck: Random) -> Wanted:
    return Wanted(name, sleeps(luck.uniform(0, 1.5), f"fall {luck.choice(SIGNALS)}"))


def _traps(name: str, luck: Random) -> Wanted:
    return Wanted(name, traps(luck.uniform(0.5, 3)), requeue=luck.random() < 0.3)


def _leaves(name: str, luck: Random) -> Wanted:
    return Wanted(name, leaves_behind(name, f"sleep {luck.uniform(0, 1):.2f}\nleave {luck.choice((0, 5))}"))


def _prints(name: str, luck: Random) -> Wanted:
    lines = luck.choice((1, 10, 1000))
    return Wanted(name, sleeps(luck.uniform(0, 1)), lines=lines, requeue=luck.random() < 0.5)


def _limited(name: str, luck: Random) -> Wanted:
    return Wanted(name, "sleep 1000\nleave 0\n", time_limit_seconds=luck.choice((1, 2)))


def _deaf(name: str, luck: Random) -> Wanted:
    return Wanted(name, "trap '' TERM\nsleep 1000 & sleep 1000\nleave 0\n", time_limit_seconds=1)


def _stopped(name: str, luck: Random) -> Wanted:
    return Wanted(name, "kill -STOP $$\nsleep 1000\nleave 0\n", time_limit_seconds=1)


KINDS: dict[Make, int] = {
    _quick: 30,
    _exits: 18,
    _falls: 12,
    _long: 14,
    _traps: 8,
    _leaves: 8,
    _prints: 8,
    _limited: 4,
    _deaf: 1,
    _stopped: 1,
}
"""How often each is wanted."""


def brief_of(name: str, luck: Random) -> Wanted:
    """A job that is soon over."""
    make = luck.choice((_quick, _quick, _exits, _falls, _leaves, _prints))
    return make(name, luck)


def any_of(name: str, luck: Random) -> Wanted:
    """A job of whatever kind."""
    [make] = luck.choices(list(KINDS), list(KINDS.values()))
    return make(name, luck)
