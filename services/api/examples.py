"""What the API's document shows of bodies and answers."""

from typing import Any, Final

from core import __version__
from core.documents import JobDocument, NodeDocument
from core.states import Reason, State

REQUEST: Final[dict[str, Any]] = {
    "job": {"account": "test", "name": "hello", "cpus_per_task": 1, "time_limit": 10},
    "script": "#!/bin/bash\necho hello\n",
}
JOB: Final[JobDocument] = {
    "job_id": 1,
    "name": "hello",
    "account": "test",
    "partition": "default",
    "state": State.COMPLETED.value,
    "state_reason": Reason.NONE.value,
    "state_description": None,
    "tasks": 1,
    "cpus_per_task": 1,
    "tasks_per_node": 1,
    "cpus": 1,
    "memory_per_node": None,
    "time_limit": "0:10:00",
    "time_limit_seconds": 600,
    "requeue": False,
    "nodes": ["node-01"],
    "batch_host": "node-01",
    "node_unreachable": False,
    "attempt": 1,
    "restart_cnt": 0,
    "submit_time": "2026-11-25T12:51:07.766526Z",
    "allocate_time": "2026-11-25T12:51:07.771250Z",
    "start_time": "2026-11-25T12:51:07.774391Z",
    "end_time": "2026-11-25T12:51:07.779806Z",
    "cancel_requested_time": None,
    "exit_code": 0,
    "signal": None,
    "current_working_directory": "/var/lib/rowlock/jobs/1",
    "standard_output": "/var/lib/rowlock/jobs/1/slurm-1.out",
    "standard_error": None,
    "comment": None,
}
NODE: Final[NodeDocument] = {
    "name": "node-01",
    "hostname": "node-01",
    "address": "http://127.0.0.1:40123",
    "state": "MIXED",
    "state_flags": ["DRAIN"],
    "reason": "new fan",
    "reason_set_by_user": "operator",
    "reason_changed_at": "2026-11-25T12:40:00.000000Z",
    "partitions": ["default"],
    "cpus": 8,
    "alloc_cpus": 1,
    "alloc_idle_cpus": 7,
    "cpu_load": 0.5,
    "real_memory": 16384,
    "version": __version__,
    "registered_time": "2026-11-25T09:00:00.000000Z",
    "heartbeat_time": "2026-11-25T12:51:05.000000Z",
    "stale_writes_refused": 0,
}
EVENTS: Final = """id: 6
data: aGVsbG8K

event: end
data: {"job_id": 1, "attempt": 1, "state": "COMPLETED"}

"""
