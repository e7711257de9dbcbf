"""One attempt among those of its job: where it ran, and which bytes of the output are its own.

A later attempt appends to what is there, and has stored before its start where that ends. A pure answer for the API,
which asks the attempt's node, and for that node's worker, which has the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from core.records import Job

Stream = Literal["stdout", "stderr"]

OFFSET_HEADER = "Rowlock-Offset"
"""Of a worker's answer that goes on, to the API: which of the attempt's bytes is the first."""


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt that came to RUNNING, with what it stored of its output if it is a restart."""

    attempt: int
    node: str
    start_time: datetime
    went_back: bool
    """Whether it went back to the queue without its script having been started."""
    restart_cnt: int | None
    """None: it stored nothing, so it either ran first or not at all."""
    stdout_begin: int | None
    """In bytes; None where there was no such file yet."""
    stderr_begin: int | None
    work_base_dir: str | None
    """Of its node; None once that is deleted."""
    job_user: str | None


def as_of(job: Job, starts: Sequence[Start], attempt: int) -> Job | None:
    """The job as it was in one of its attempts; None when its script was not started in that one."""
    ran = [start for start in starts if not start.went_back]
    own = next((start for start in ran if start.attempt == attempt), None)
    if own is None or (own.restart_cnt is None and own is not ran[0]):
        return None
    return replace(
        job,
        attempt=attempt,
        restart_cnt=own.restart_cnt or 0,
        node=own.node,
        start_time=own.start_time,
        work_base_dir=own.work_base_dir,
        job_user=own.job_user,
    )


def own_bytes(starts: Sequence[Start], attempt: int, stream: Stream, path_of: Callable[[int], str], size: int) -> range:
    """Which bytes of its file, which has so many, an attempt that ran has written.

    `path_of` tells where a restart writes: not all of them need have written to this file. They have where they ran
    on the same node; elsewhere when the nodes share it, as a node shows that found it before any attempt ran there.
    """

    def begin_of(start: Start) -> int | None:
        return start.stdout_begin if stream == "stdout" else start.stderr_begin

    own = next(start for start in starts if start.attempt == attempt)
    first_on = {start.node: start for start in reversed(starts)}
    shared = any(begin_of(start) is not None for start in first_on.values())
    path, end = path_of(own.restart_cnt or 0), size
    for start in starts:
        if start.attempt <= attempt or start.restart_cnt is None or path_of(start.restart_cnt) != path:
            continue
        begin = begin_of(start)
        if start.node == own.node or (shared and begin is not None):
            end = begin or 0  # one that found nothing, here, found this one's bytes removed
            break
    return range(begin_of(own) or 0, min(end, size))
