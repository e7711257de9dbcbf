"""Where a job works and writes: one pure answer for the worker that opens the files and the API that shows them."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from core.patterns import expand

NULL_DEVICE = PurePosixPath("/dev/null")


@dataclass(frozen=True, slots=True)
class JobPaths:
    """Absolute paths on the job's node. The two outputs are one path when stderr joins stdout."""

    working_directory: PurePosixPath
    standard_output: PurePosixPath
    standard_error: PurePosixPath


def resolve(
    work_base_dir: str,
    *,
    job_id: int,
    name: str,
    node: str,
    user: str,
    restart_cnt: int,
    current_working_directory: str | None,
    standard_output: str,
    standard_error: str | None,
) -> JobPaths:
    """Resolve what was submitted: relative working directories lie under `work_base_dir`, outputs under the former."""
    base = PurePosixPath(work_base_dir)
    working_directory = base / (current_working_directory or str(job_id))

    def output(pattern: str) -> PurePosixPath:
        words = expand(pattern, job_id=job_id, name=name, user=user, node=node, restart_cnt=restart_cnt)
        return working_directory / words

    stdout = output(standard_output)
    return JobPaths(working_directory, stdout, stdout if standard_error is None else output(standard_error))
