"""The machine's facts, and who used its CPUs."""

import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.settings import usable_cpus

TICK = 1 / os.sysconf("SC_CLK_TCK")
SCRIPTS = "scripts"
OTHERS = "others"
PROBE_FILES = 500

# As they show in `ps`: `rowlock api` and `python -m services.api` are one role, and so are those of bench/width.py.
_ROLE = re.compile(r"(?:rowlock |services\.|bench\.)(api|scheduler|worker|standalone)\b|(valkey-server)|(postgres)")
_NAMES = {"standalone": "supervisor", "valkey-server": "redis"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a figure depends on."""

    cpus: int
    usable_cpus: int
    cpu_model: str
    memory_mib: int
    kernel: str
    python: str
    bash: str
    filesystem: str
    file_microseconds: float
    load: tuple[float, float, float]


def facts(workspace: Path) -> Machine:
    """The facts, as they are now. `workspace` is where the stacks will be."""
    return Machine(
        cpus=os.cpu_count() or 1,
        usable_cpus=usable_cpus(),
        cpu_model=_cpu_model(),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        kernel=platform.release(),
        python=platform.python_version(),
        bash=_first_line("/bin/bash", "--version"),
        filesystem=_filesystem(workspace),
        file_microseconds=_file_microseconds(workspace / "probe"),
        load=os.getloadavg(),
    )


def load() -> float:
    """The load average of the last minute; what is measured has its part in it."""
    return os.getloadavg()[0]


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _filesystem(folder: Path) -> str:
    """The type of the one that a folder lies on: the longest mount point above it wins."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place)]
    return max(above, default=(0, "unknown"))[1]  # in a chroot nothing need be mounted


def _file_microseconds(folder: Path) -> float:
    """CPU that it takes to make a small file. A job makes three; what was deleted around here lately makes it dear."""
    folder.mkdir()
    began = time.process_time()
    for number in range(PROBE_FILES):
        os.close(os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return round((time.process_time() - began) / PROBE_FILES * 1e6, 1)


def _first_line(*command: str) -> str:
    text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    return text.partition("\n")[0]


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds so far: of the whole machine, and of the stack by role, ended scripts apart."""

    machine: float
    stack: Mapping[str, float]


def cpu_times(stack_pid: int) -> CpuTimes:
    """Read them; an unreaped script counts with the next look."""
    by_role: defaultdict[str, float] = defaultdict(float)
    for pid in (stack_pid, *_descendants(stack_pid)):
        role = _role(pid)
        own, reaped = _cpu_of(pid)
        if role == "worker":
            by_role[SCRIPTS] += reaped
        if role is not None:
            by_role[role] += own + (reaped if role == "postgres" else 0.0)
    return CpuTimes(_busy(), dict(by_role))


def used(before: CpuTimes, after: CpuTimes, load_generator: float) -> dict[str, float]:
    """CPU seconds by role between two looks; `others` is what neither the stack nor the load generator used."""
    found = {role: after.stack[role] - before.stack.get(role, 0.0) for role in sorted(after.stack)}
    found["load generator"] = load_generator
    found[OTHERS] = max(0.0, after.machine - before.machine - sum(found.values()))
    return {role: round(seconds, 3) for role, seconds in found.items()}


def memory(stack_pid: int) -> dict[str, int]:
    """KiB by role: what several processes share counts for each with its part of it (PSS)."""
    by_role: defaultdict[str, int] = defaultdict(int)
    for pid in (stack_pid, *_descendants(stack_pid)):
        if (role := _role(pid)) is not None:
            by_role[role] += _pss(pid)
    return dict(by_role)


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended meanwhile
        return 0
    return int(text.partition("\nPss:")[2].split(maxsplit=1)[0])


def _busy() -> float:
    """User, nice, system, interrupts: proc(5). Neither idle nor waiting for a disk."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) * TICK


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended meanwhile
        return []


def _role(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    found = _ROLE.search(words)
    return None if found is None else _NAMES.get(found[found.lastindex or 0], found[found.lastindex or 0])


def _cpu_of(pid: int) -> tuple[float, float]:
    """CPU seconds of a process itself, and of the children that it has reaped: proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0, 0.0
    own, system, reaped, reaped_system = (int(field) * TICK for field in fields[11:15])
    return own + system, reaped + reaped_system
