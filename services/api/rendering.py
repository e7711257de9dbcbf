"""A job or a node as JSON."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from aiohttp import web

from core.documents import JobDocument, NodeDocument
from core.paths import JobPaths, resolve
from core.records import Job, Node
from core.units import format_time_limit


def answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """JSON with a line end, for the eyes of people at a terminal."""
    body = json.dumps(document).encode() + b"\n"
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def rfc3339(time: datetime) -> str:
    """The time in UTC, to the microsecond."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _when(time: datetime | None) -> str | None:
    return None if time is None else rfc3339(time)


def paths_of(job: Job) -> JobPaths | None:
    """Where the job works and writes on its node; None before it has one."""
    if job.node is None or job.work_base_dir is None or job.job_user is None:
        return None
    return resolve(
        job.work_base_dir,
        job_id=job.job_id,
        name=job.name,
        node=job.node,
        user=job.job_user,
        restart_cnt=job.restart_cnt,
        current_working_directory=job.current_working_directory,
        standard_output=job.standard_output,
        standard_error=job.standard_error,
    )


def job_document(job: Job) -> JobDocument:
    """The job as clients see it."""
    paths = paths_of(job)
    return {
        "job_id": job.job_id,
        "name": job.name,
        "account": job.account,
        "partition": job.partition,
        "state": job.state.value,
        "state_reason": job.state_reason,
        "state_description": job.state_description,
        "tasks": job.tasks,
        "cpus_per_task": job.cpus_per_task,
        "tasks_per_node": job.tasks,
        "cpus": job.cpus,
        "memory_per_node": job.memory_mib,
        "time_limit": format_time_limit(job.time_limit_seconds),
        "time_limit_seconds": job.time_limit_seconds,
        "requeue": job.requeue,
        "nodes": [] if job.node is None else [job.node],
        "batch_host": job.node,
        "node_unreachable": job.node_unreachable,
        "attempt": job.attempt,
        "restart_cnt": job.restart_cnt,
        "submit_time": rfc3339(job.submit_time),
        "allocate_time": _when(job.allocate_time),
        "start_time": _when(job.start_time),
        "end_time": _when(job.end_time),
        "cancel_requested_time": _when(job.cancel_requested_time),
        "exit_code": job.exit_code,
        "signal": job.signal,
        "current_working_directory": paths.working_directory if paths else job.current_working_directory,
        "standard_output": paths.standard_output if paths else job.standard_output,
        "standard_error": paths.standard_error if paths else job.standard_error,
        "comment": job.comment,
    }


def part(job: JobDocument, fields: frozenset[str] | None) -> Mapping[str, object]:
    """These fields of a job, in its order; None: all."""
    return job if fields is None else {name: value for name, value in job.items() if name in fields}


def node_document(node: Node) -> NodeDocument:
    """The node as clients see it; its secret is not among it."""
    return {
        "name": node.name,
        "hostname": node.hostname,
        "address": node.address,
        "state": _state(node),
        "state_flags": _flags(node),
        "reason": node.admin_reason or _reason(node),
        "reason_set_by_user": node.admin_by,
        "reason_changed_at": _when(node.admin_time),
        "partitions": list(node.partitions),
        "cpus": node.cpus,
        "alloc_cpus": node.alloc_cpus,
        "alloc_idle_cpus": node.cpus - node.alloc_cpus,
        "cpu_load": node.cpu_load,
        "real_memory": node.memory_mib,
        "version": node.version,
        "registered_time": rfc3339(node.registered_time),
        "heartbeat_time": _when(node.heartbeat_time),
        "stale_writes_refused": node.stale_writes_refused,
    }


def _state(node: Node) -> str:
    if not node.alive or node.admin_state == "DOWN":
        return "DOWN"
    if node.alloc_cpus == 0:
        return "IDLE"
    return "ALLOCATED" if node.alloc_cpus >= node.cpus else "MIXED"


def _flags(node: Node) -> list[str]:
    flags = []
    if node.admin_state == "DRAIN" or node.draining:
        flags.append("DRAIN")
    if not node.alive:
        flags.append("NOT_RESPONDING")
    return flags


def _reason(node: Node) -> str | None:
    if not node.alive:
        return "its worker stopped" if node.draining else "its worker's lease is over"
    return "its worker is stopping" if node.draining else None
