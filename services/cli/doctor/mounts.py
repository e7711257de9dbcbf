"""What is mounted where, from /proc/self/mountinfo (proc(5))."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount; `options` are its own and those of its file system."""

    place: Path
    kind: str
    options: frozenset[str]


def mounts() -> list[Mount]:
    """Every mount that this process sees, later ones over earlier ones."""
    return read_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))


def read_mounts(text: str) -> list[Mount]:
    """The mounts of a mountinfo file."""
    found = []
    for line in text.splitlines():
        own, _, system = line.partition(" - ")
        place, options = own.split()[4:6]
        kind, *rest = system.split()
        found.append(Mount(Path(_unescaped(place)), kind, frozenset(",".join((options, *rest[1:])).split(","))))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(path: Path, found: Sequence[Mount]) -> Mount | None:
    """The mount that a path without links lies on."""
    return max(
        (mount for mount in found if path.is_relative_to(mount.place)),
        key=lambda mount: (len(mount.place.parts), found.index(mount)),
        default=None,
    )
