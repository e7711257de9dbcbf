"""What a job is started with: its paths, its command, its environment."""

import os
import pwd
import socket

from core.paths import JobPaths, resolve
from core.records import Job, JobSpec
from core.settings import Settings
from services.worker.environment import Host, job_environment
from services.worker.files import command_for


def describe_host(settings: Settings, spool_id: str) -> Host:
    """What the environment of every job of this worker has in common: jobs run as the worker's own user."""
    uid = os.getuid()
    try:
        account = pwd.getpwuid(uid)
        user, home, shell = account.pw_name, account.pw_dir, account.pw_shell
    except KeyError:  # a container's account without a name
        user, home, shell = str(uid), "/", "/bin/sh"
    return Host(
        node=settings.node_name,
        hostname=socket.gethostname(),
        spool_id=spool_id,
        path=settings.job_path,
        home=home,
        user=user,
        uid=uid,
        gid=os.getgid(),
        shell=shell or "/bin/sh",
    )


def paths_of(settings: Settings, host: Host, job: JobSpec | Job) -> JobPaths:
    """Where a job of this node works and writes."""
    return resolve(
        str(settings.work_base_dir),
        job_id=job.job_id,
        name=job.name,
        node=settings.node_name,
        user=host.user,
        restart_cnt=job.restart_cnt,
        current_working_directory=job.current_working_directory,
        standard_output=job.standard_output,
        standard_error=job.standard_error,
    )


def command_and_environment(
    host: Host, spec: JobSpec, paths: JobPaths, script: str
) -> tuple[list[str], dict[str, str]]:
    """The argument vector and the whole environment of a job whose script lies at `script`. Raises LaunchFailed."""
    environment = job_environment(spec, host=host, directory=paths.working_directory)
    return command_for(script, spec.script), environment
