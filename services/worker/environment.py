"""What a job's script finds in its environment: built from nothing, so it holds no secret of the worker's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from services.worker.proc import tag_of

if TYPE_CHECKING:  # the keeper, which imports this, needs the standard library alone
    from core.records import JobSpec

MARK: Final = "ROWLOCK_JOB"
"""The variable by which the processes of a job are known; its value is `mark()`."""


@dataclass(frozen=True, slots=True)
class Host:
    """What the environment of every job on a node has in common."""

    node: str
    hostname: str
    spool_id: str
    path: str
    home: str
    user: str
    uid: int
    gid: int
    shell: str = "/bin/sh"
    lang: str = "C.UTF-8"
    tmpdir: str = "/tmp"  # noqa: S108  the value of TMPDIR, nothing is opened here
    cluster: str = "rowlock"


def mark(job_id: int, attempt: int, spool_id: str) -> str:
    """The value of `MARK` for one attempt of a job.

    The spool's id tells it from job 1 of another Rowlock on the same machine, whose processes `end_marked`
    must not find.
    """
    return f"{job_id}:{attempt}:{spool_id}"


def read_mark(text: str | None) -> tuple[int, int, str] | None:
    """The job, the attempt and the spool's id that a mark names; None when it is no mark."""
    words = (text or "").split(":")
    return (int(words[0]), int(words[1]), words[2]) if len(words) == 3 and _are_numbers(words[:2]) else None


def tag_of_mark(text: str | None) -> int | None:
    """The tag (proc.py) of the attempt that a mark names; None when it is no mark."""
    named = read_mark(text)
    return None if named is None else tag_of(*named)


def _are_numbers(words: list[str]) -> bool:
    return all(word.isascii() and word.isdecimal() and len(word) < 20 for word in words)


def job_environment(spec: JobSpec, *, host: Host, directory: str) -> dict[str, str]:
    """The whole environment of a job that works in `directory` (absolute).

    A later part wins: the account's variables, then the job's own, then ``SLURM_*``, and the mark.
    ``SLURM_TASK_PID`` is left out: the process does not exist yet, and only another process in between
    could tell it; a script has ``$$``.
    """
    return {
        **_account(host),
        **spec.environment,
        "ENVIRONMENT": "BATCH",
        **_job(spec),
        **_placement(spec, host),
        **_identity(host, directory),
        **_times(spec),
        **_when_given(spec),
        MARK: mark(spec.job_id, spec.attempt, host.spool_id),
    }


def _account(host: Host) -> dict[str, str]:
    return {
        "PATH": host.path,
        "HOME": host.home,
        "USER": host.user,
        "LOGNAME": host.user,
        "SHELL": host.shell,
        "LANG": host.lang,
        "TMPDIR": host.tmpdir,
    }


def _job(spec: JobSpec) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(spec.job_id),
        "SLURM_JOBID": str(spec.job_id),
        "SLURM_JOB_NAME": spec.name,
        "SLURM_JOB_PARTITION": spec.partition,
        "SLURM_JOB_ACCOUNT": spec.account,
        "SLURM_JOB_QOS": "normal",
        "SLURM_NTASKS": str(spec.tasks),
        "SLURM_NPROCS": str(spec.tasks),
    }


def _placement(spec: JobSpec, host: Host) -> dict[str, str]:
    return {
        "SLURM_JOB_NODELIST": host.node,
        "SLURM_NODELIST": host.node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_CPUS_PER_NODE": str(spec.cpus),
        "SLURM_CPUS_ON_NODE": str(spec.cpus),
        "SLURM_TASKS_PER_NODE": str(spec.tasks),
        "SLURMD_NODENAME": host.node,
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }


def _identity(host: Host, directory: str) -> dict[str, str]:
    return {
        "SLURM_JOB_USER": host.user,
        "SLURM_JOB_UID": str(host.uid),
        "SLURM_JOB_GID": str(host.gid),
        "SLURM_CLUSTER_NAME": host.cluster,
        "SLURM_SUBMIT_DIR": directory,
        "SLURM_SUBMIT_HOST": host.hostname,
    }


def _times(spec: JobSpec) -> dict[str, str]:
    start = int(spec.start_time.timestamp())
    if spec.time_limit_seconds is None:
        return {"SLURM_JOB_START_TIME": str(start)}
    return {"SLURM_JOB_START_TIME": str(start), "SLURM_JOB_END_TIME": str(start + spec.time_limit_seconds)}


def _when_given(spec: JobSpec) -> dict[str, str]:
    given = {
        "SLURM_CPUS_PER_TASK": spec.cpus_per_task if spec.cpus_per_task_given else None,
        "SLURM_NTASKS_PER_NODE": spec.tasks if spec.tasks_per_node_given else None,
        "SLURM_MEM_PER_NODE": spec.memory_mib,
        "SLURM_RESTART_COUNT": spec.restart_cnt or None,
    }
    return {name: str(value) for name, value in given.items() if value is not None}
