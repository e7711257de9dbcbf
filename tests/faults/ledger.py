"""The ledger: what the scripts of a run say of themselves, each line one append to one file of all.

A line is written before the effect that it tells of (an end before the exit) and after the one that made it
possible (a start after the allocation's commit), and the file holds the lines in the order in which they were
written. So two lines of one machine need no clock to be told apart.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.records import Attempt

Word = Literal["start", "end", "child", "short"]


@dataclass(frozen=True, slots=True)
class Line:
    """What a script said: `details` are a start's CPUs, an end's exit (`exit 3`, `signal KILL`), a child's pid.

    `short`: it could not write all of its output.
    """

    word: Word
    attempt: Attempt
    pid: int
    time: float
    node: str
    details: tuple[str, ...] = ()
    at: int = 0
    """Where in the file it begins."""


def parse(text: str) -> list[Line]:
    """The lines in the order in which they were written. One that was cut short is a fault of the disk, and skipped."""
    found, at = [], 0
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and len(words) >= 6:
            word, job_id, attempt, pid, time, node, *details = words
            attempt_of = Attempt(int(job_id), int(attempt))
            found.append(Line(word, attempt_of, int(pid), float(time), node, tuple(details), at))  # type: ignore[arg-type]
        at += len(line)
    return found


def read(path: Path) -> list[Line]:
    """The ledger in a file, empty where nothing has started yet."""
    return parse(path.read_text(encoding="ascii")) if path.exists() else []


def size(path: Path) -> int:
    """Where in the ledger the next line will stand."""
    return path.stat().st_size if path.exists() else 0


def by_attempt(lines: Iterable[Line]) -> dict[Attempt, list[Line]]:
    """The lines of each attempt."""
    found: dict[Attempt, list[Line]] = {}
    for line in lines:
        found.setdefault(line.attempt, []).append(line)
    return found


@dataclass(frozen=True, slots=True)
class Life:
    """The time for which an attempt's script held its CPUs; `ended` is None while nobody can say."""

    attempt: Attempt
    node: str
    cpus: int
    started: float
    ended: float | None


def lives(lines: Sequence[Line], released: dict[Attempt, float]) -> Iterator[Life]:
    """From each start to the end that the script wrote, or else to the release of its CPUs in the database."""
    ends = {line.attempt: line.time for line in lines if line.word == "end"}
    for line in lines:
        if line.word == "start":
            ended = ends.get(line.attempt, released.get(line.attempt))
            yield Life(line.attempt, line.node, int(line.details[0]), line.time, ended)


def most_held(found: Iterable[Life]) -> dict[str, int]:
    """The most CPUs of each node that overlapping lives held. At one instant, ends come before starts."""
    moves: dict[str, list[tuple[float, int]]] = {}
    for life in found:
        node = moves.setdefault(life.node, [])
        node.append((life.started, life.cpus))
        if life.ended is not None:
            node.append((life.ended, -life.cpus))
    most = {}
    for node, changes in moves.items():
        held = most[node] = 0
        for _, change in sorted(changes):
            held += change
            most[node] = max(most[node], held)
    return most
