"""The names of output files: Slurm's ``%`` patterns (sbatch(1), "FILENAME PATTERN")."""

import re
from typing import Final

DEFAULT: Final = "slurm-%j.out"

MAX_COMPONENT: Final = 255
"""Bytes of one name in a path (NAME_MAX)."""

MAX_PATH: Final = 4000
"""Bytes of a whole pattern: below PATH_MAX, with room for what is filled in."""

# Slurm bounds the padding as well: a number of any size would be a name of any size.
_MAX_WIDTH: Final = 10
_SYMBOL: Final = re.compile(r"%([0-9]*)([%AajJNntsuxr])", re.ASCII)


def expand(
    pattern: str,
    *,
    job_id: int,
    name: str,
    user: str,
    node: str,
    restart_cnt: int,
    array_job_id: int | None = None,
    array_task_id: int | None = None,
) -> str:
    """Fill in a pattern. What is filled in never makes, skips or leaves a folder: ``/`` and NUL become ``_``.

    ``%A`` of a job outside an array is its own id, ``%a`` is 0. A symbol that Slurm does not know stays as
    it is.
    """
    numbers = {
        "j": job_id,
        "J": job_id,
        "A": job_id if array_job_id is None else array_job_id,
        "a": array_task_id or 0,
        "r": restart_cnt,
        "n": 0,
        "t": 0,
    }
    texts = {"%": "%", "s": "batch", "x": name, "u": user, "N": node.partition(".")[0]}

    def replacement(found: re.Match[str]) -> str:
        width, symbol = found.groups()
        if symbol in numbers:
            return str(numbers[symbol]).zfill(min(int(width[:4] or 0), _MAX_WIDTH))
        return texts[symbol].replace("/", "_").replace("\0", "_")

    return "/".join(_component(part, _SYMBOL.sub(replacement, part)) for part in pattern.split("/"))


def _component(pattern: str, filled: str) -> str:
    """A name such as ".." must not become a folder only because a job is called so, nor may a name vanish."""
    if filled == pattern or filled not in ("", ".", ".."):
        return filled
    return filled.replace(".", "_") or "_"


def validate(pattern: str) -> None:
    """Raise ValueError, saying why, for a pattern that cannot name a file."""
    if not pattern:
        raise ValueError("a file name must not be empty")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in pattern):
        raise ValueError("a file name must not hold control characters")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in pattern):
        raise ValueError("a file name must be text: it holds half a surrogate pair")
    if len(pattern.encode()) > MAX_PATH:
        raise ValueError(f"a path is at most {MAX_PATH} bytes long")
    _validate_components(pattern.split("/"))


def _validate_components(parts: list[str]) -> None:
    if ".." in parts:
        raise ValueError("a path must not hold '..'")
    if parts[-1] in ("", "."):
        raise ValueError("a path must end in the name of a file")
    if any(len(part.encode()) > MAX_COMPONENT for part in parts):
        raise ValueError(f"each name in a path is at most {MAX_COMPONENT} bytes long")
