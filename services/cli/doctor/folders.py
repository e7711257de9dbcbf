"""The folders that a worker writes to: whose they are, who may write there, on what they lie, how full that is."""

import os
import pwd
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.settings import Settings
from services.cli.doctor.finding import Finding, fault, ok, warning
from services.cli.doctor.mounts import Mount, mount_of, mounts

SCRIPTS, JOBS = "SCRIPT_DIR", "JOB_WORK_BASE_DIR"
GIB = 1024**3
LEAST_BYTES, FEW_BYTES = GIB // 16, GIB
LEAST_FILES, FEW_FILES = 1_000, 20_000

NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "afs"})


@dataclass(frozen=True, slots=True)
class Folder:
    """What was seen of a folder; of one that is not there yet, of the nearest one above it."""

    name: str
    path: str
    exists: bool
    is_folder: bool
    owner: str
    ours: bool
    mode: int
    writable: bool
    kind: str
    noexec: bool
    free_bytes: int
    free_files: int | None
    """None where the file system does not count them."""


def look(settings: Settings) -> list[Folder]:
    """Look at each; nothing is made."""
    mounted = mounts()
    folders = ((SCRIPTS, settings.scripts_dir), (JOBS, settings.work_base_dir))
    return [_look_at(name, path, mounted) for name, path in folders]


def _look_at(name: str, path: Path, mounted: Sequence[Mount]) -> Folder:
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    there = (nearest if nearest.exists() else nearest.parent).resolve()  # a link may lead nowhere
    found, system = there.stat(), os.statvfs(there)
    mount = mount_of(there, mounted)
    return Folder(
        name=name,
        path=str(path),
        exists=path.exists(),
        is_folder=nearest.is_dir(),
        owner=_name_of(found.st_uid),
        ours=found.st_uid == os.geteuid(),
        mode=stat.S_IMODE(found.st_mode),
        writable=os.access(there, os.W_OK | os.X_OK),
        kind=mount.kind if mount else "an unknown file system",
        noexec=bool(system.f_flag & os.ST_NOEXEC),
        free_bytes=system.f_bavail * system.f_frsize,
        free_files=system.f_favail if system.f_files else None,
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def judge(folder: Folder) -> list[Finding]:
    """What is wrong with it, or the one line that nothing is."""
    if not folder.is_folder:
        return [fault(folder.name, f"{folder.path} is no folder, or lies below none", "a folder")]
    return [*_rights(folder), *_place(folder), *_room(folder)] or [ok(folder.name, _described(folder))]


def _rights(folder: Folder) -> list[Finding]:
    name, path = folder.name, folder.path
    if not folder.writable:
        right = "this command should run as the worker's user, and that one should be able to write there"
        return [fault(name, f"{path} cannot be {'written to' if folder.exists else 'made'} by this user", right)]
    if not folder.exists:
        return []
    who = f"{path} belongs to {folder.owner}, mode {folder.mode:04o}"
    if name == SCRIPTS and folder.mode & 0o022:
        return [fault(name, f"{who}: others may change the scripts of running jobs", "mode 0700")]
    if folder.mode & 0o002 and not folder.mode & stat.S_ISVTX:
        return [warning(name, f"{who}: others may remove the outputs of jobs", "mode 0755, or the sticky bit")]
    if name == SCRIPTS and not folder.ours:
        return [warning(name, who, "it should belong to the worker's user, and this command run as that one")]
    return []


def _place(folder: Folder) -> list[Finding]:
    network = folder.kind in NETWORK or folder.kind.startswith("fuse.")
    if folder.name == JOBS or not network:
        return []
    detail = f"{folder.path} is on {folder.kind}: the lock by which one worker knows of another may fail or hang there"
    return [warning(folder.name, detail, "a folder on a disk of this machine")]


def _room(folder: Folder) -> list[Finding]:
    room = f"{folder.path} has {folder.free_bytes / GIB:.1f} GiB"
    room += "" if folder.free_files is None else f" and {folder.free_files} files"
    files = FEW_FILES if folder.free_files is None else folder.free_files
    if folder.free_bytes < LEAST_BYTES or files < LEAST_FILES:
        return [fault(folder.name, f"{room} left: jobs cannot start there", "1 GiB and 20000 files, or more")]
    if folder.free_bytes < FEW_BYTES or files < FEW_FILES:
        return [warning(folder.name, f"{room} left", "1 GiB and 20000 files, or more")]
    return []


def _described(folder: Folder) -> str:
    whose = f"{folder.owner}'s, mode {folder.mode:04o}" if folder.exists else "not there yet, and can be made"
    noexec = ", noexec, which is fine" if folder.noexec else ""
    return f"{folder.path}: {whose}, {folder.kind}{noexec}, {folder.free_bytes / GIB:.1f} GiB free"
