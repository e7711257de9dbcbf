"""What the kernel of this machine gives a worker to hold its jobs with."""

import ctypes
import os
import platform
import pwd
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.cli.doctor.finding import Finding, fault, ok, warning
from services.cli.doctor.mounts import Mount, mounts

# The worker's tag (services/worker/proc.py); the same number on x86-64 and arm64.
_RLIMIT_LOCKS = 10
_PR_GET_CHILD_SUBREAPER = 37

Cgroup = Literal["there is no cgroup v2", "cgroup v2 is not delegated to this user", "cgroup v2 is delegated"]


@dataclass(frozen=True, slots=True)
class Node:
    """What was seen of this machine, as this user sees it."""

    release: str
    pidfds: bool
    subreaper: bool
    lists_children: bool
    tags: bool
    hidepid: str
    cgroup: Cgroup
    user: str
    is_root: bool


def look() -> Node:
    """Ask the kernel; nothing is changed."""
    mounted = mounts()
    return Node(
        release=platform.release(),
        pidfds=_has_pidfds(),
        subreaper=ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(ctypes.c_int()), 0, 0, 0) == 0,
        lists_children=Path(f"/proc/self/task/{os.getpid()}/children").exists(),
        tags=resource.getrlimit(_RLIMIT_LOCKS)[1] == resource.RLIM_INFINITY,
        hidepid=hidepid(mounted),
        cgroup=_cgroup(mounted),
        user=_user(),
        is_root=os.geteuid() == 0,
    )


def judge(node: Node) -> list[Finding]:
    """What is to be said of it."""
    return [_kernel(node), _children(node), _tags(node), _sight(node), _containment(node), _isolation(node)]


def _kernel(node: Node) -> Finding:
    if not node.pidfds:
        return fault("kernel", f"Linux {node.release}, and pidfd_open is refused", "a sandbox that allows it")
    return ok("kernel", f"Linux {node.release}, with pidfds")


def _children(node: Node) -> Finding:
    if node.lists_children:
        return ok("children", "the kernel lists them")
    detail = "/proc/PID/task/TID/children is missing: to find what a job left, all of /proc is read"
    return warning("children", detail, "a kernel with CONFIG_PROC_CHILDREN")


def _tags(node: Node) -> Finding:
    if node.tags:
        return ok("hard limit of locks", "unlimited")
    return fault("hard limit of locks", "jobs cannot be tagged: no worker starts", "ulimit -H -x: unlimited")


def _sight(node: Node) -> Finding:
    if node.hidepid == "0" or node.is_root:
        return ok("hidepid", "every process is seen")
    detail = f"/proc is mounted with hidepid={node.hidepid}: what a job started as another user is not seen"
    return warning("hidepid", detail, "hidepid=0, or a gid= that this user is in")


def _containment(node: Node) -> Finding:
    if not node.subreaper:
        return fault("containment", "there are no subreapers: what leaves its session is lost", "Linux 3.4 or later")
    return ok(
        "containment",
        "a subreaper, a tag on every process (RLIMIT_LOCKS), sessions: only what takes off its tag, leaves its session"
        f" and clears its environment may outlive its job; {node.cgroup}, and not used",
    )


def _isolation(node: Node) -> Finding:
    detail = f"jobs run as the worker's own user, here {node.user}: nothing isolates them from each other, nor from it"
    return warning("isolation", detail, "a user that owns nothing else, a worker for each circle that trusts itself")


def hidepid(mounted: Sequence[Mount]) -> str:
    """The option of /proc by which processes of others are hidden; 0 when they are not."""
    options = next((mount.options for mount in reversed(mounted) if mount.place == Path("/proc")), frozenset[str]())
    value = next((option.removeprefix("hidepid=") for option in options if option.startswith("hidepid=")), "0")
    return "0" if value == "off" else value


def _has_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _cgroup(mounted: Sequence[Mount]) -> Cgroup:
    mount = next((mount for mount in mounted if mount.kind == "cgroup2"), None)
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if mount is None or path is None:
        return "there is no cgroup v2"
    folder = mount.place / path.lstrip("/")
    writable = os.access(folder, os.W_OK | os.X_OK) and os.access(folder / "cgroup.procs", os.W_OK)
    return "cgroup v2 is delegated" if writable else "cgroup v2 is not delegated to this user"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's account without a name
        return str(os.geteuid())
