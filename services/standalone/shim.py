"""Become a process that ends when its starter ends: `python -I -S shim.py SIGNAL PARENT IDENTITY COMMAND…`.

Run as a script, standard library only. SIGNAL is what the kernel sends to COMMAND when the thread that
started it is gone (also by `kill -9`); PARENT is the starter's pid; IDENTITY is one of

- `same`: as the starter;
- `mapped:UID:GID`: in a user namespace of its own, in which the starter's user is called UID: for PostgreSQL,
  which refuses to be called 0. Nothing is gained or lost outside;
- `account:UID:GID`: for root where user namespaces are refused: as that user, keeping of root's rights only
  CAP_DAC_OVERRIDE, so that binaries and data may stay where nobody but root can go.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 28, 38, 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 4
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(what: str, option: int, *values: int) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)), what)


def _map_user(uid: int, gid: int) -> None:
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    _checked(_libc.unshare(CLONE_NEWUSER), "user namespace")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1")


def _become_account(uid: int, gid: int) -> None:
    _prctl("keep capabilities", PR_SET_KEEPCAPS, 1)
    with suppress(OSError):
        # access(2) sets capabilities aside for all but root, and by it initdb looks for what lies beside it (kernel,
        # fs/open.c, access_override_creds). Who may not say so gets by where everybody can go.
        _prctl("capabilities of access", PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    bit = 1 << CAP_DAC_OVERRIDE
    words = (_Words * 2)(_Words(bit, bit, bit), _Words(0, 0, 0))
    _checked(_libc.capset(ctypes.byref(_Header(CAPABILITY_VERSION_3, 0)), words), "capset")
    _prctl("ambient capability", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE)
    _prctl("no new privileges", PR_SET_NO_NEW_PRIVS, 1)


def _assume(identity: str) -> None:
    kind, *ids = identity.split(":")
    if kind == "mapped":
        _map_user(int(ids[0]), int(ids[1]))
    elif kind == "account":
        _become_account(int(ids[0]), int(ids[1]))


def main(argv: list[str]) -> None:
    signum, parent, identity, *command = argv
    _assume(identity)
    # After the identity: a change of credentials clears it. It outlives execve, which is all that follows.
    _prctl("parent death signal", PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != int(parent):
        sys.exit(0)  # the starter was gone before the kernel had been asked to tell
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and execve would hand that on
        signal.signal(ignored, signal.SIG_DFL)
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
