"""What Rowlock runs on. The standard library alone: every command looks here first."""

import platform
import re
import sys

OLDEST_KERNEL, OLDEST_GLIBC = (5, 4), (2, 28)
"""pidfd_open came with 5.3, which had no long life; the wheels of what Rowlock needs are for this glibc."""


def unsupported() -> str | None:
    """What is wrong with this machine, in one line, if anything."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"Rowlock runs on Linux, x86-64 or arm64; this is {sys.platform} on {platform.machine()}."
    if platform.python_implementation() != "CPython":
        return f"Rowlock runs on CPython; this is {platform.python_implementation()}."
    if _numbers(platform.release()) < OLDEST_KERNEL:
        return f"Rowlock runs on Linux 5.4 or later; this is {platform.release()}."
    library, version = platform.libc_ver()
    if library != "glibc" or _numbers(version) < OLDEST_GLIBC:
        found = f"{library} {version}" if library else "another C library"
        return f"Rowlock runs on Linux with glibc 2.28 or later; this system has {found}."
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two of a version, whatever follows: `5.4.0-42-generic`, `6.1-rc1`."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
