"""Where a job works and writes: one pure answer for the worker that opens the files and the API that shows them."""

from dataclasses import dataclass

from core.patterns import expand


@dataclass(frozen=True, slots=True)
class JobPaths:
    """Absolute paths on the job's node, without empty names. The two outputs are one when stderr joins stdout."""

    working_directory: str
    standard_output: str
    standard_error: str


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
    working_directory = _below(work_base_dir, current_working_directory or str(job_id))

    def output(pattern: str) -> str:
        words = expand(pattern, job_id=job_id, name=name, user=user, node=node, restart_cnt=restart_cnt)
        return _below(working_directory, words)

    stdout = output(standard_output)
    return JobPaths(working_directory, stdout, stdout if standard_error is None else output(standard_error))


def _below(folder: str, path: str) -> str:
    """`path` itself when it is absolute. By hand: it is in the way of each start, and pathlib takes its time."""
    whole = path if path.startswith("/") else f"{folder}/{path}"
    return "/" + "/".join(name for name in whole.split("/") if name not in ("", "."))
