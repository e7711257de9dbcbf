"""``--export``: a job sees what is said there, and nothing else of the shell that submits it."""

import re
import shlex
from collections.abc import Mapping

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NOT_FOR_JOBS = ("SLURM_", "ROWLOCK_")
"""The first are the job's own, the second may hold secrets of who submits."""


def exported(said: str, here: Mapping[str, str]) -> dict[str, str]:
    """The variables of a job, `here` being the shell's; ValueError says what would be right.

    With ALL come those that a job can have: named like variables, and text.
    """
    words = _split(said)
    if "NONE" in words and len(words) > 1:
        raise ValueError("NONE should stand alone")
    found = {name: value for name, value in here.items() if _is_for_jobs(name, value)} if "ALL" in words else {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            found[name] = value
        elif word in here:
            found[word] = here[word]
        elif word not in ("ALL", "NONE"):
            raise ValueError(f"{word} is not set here; say {word}=VALUE")
    return found


def _split(said: str) -> list[str]:
    """At commas; quotes keep one in a value. A backslash is itself."""
    words = shlex.shlex(said, posix=True, punctuation_chars=False)
    words.whitespace, words.whitespace_split, words.escape, words.commenters = ",", True, "", ""
    return list(words)


def _is_for_jobs(name: str, value: str) -> bool:
    is_text = value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return _VARIABLE.fullmatch(name) is not None and not name.startswith(_NOT_FOR_JOBS) and is_text
