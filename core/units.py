"""Time limits and memory sizes as people write them: Slurm's text, or plain numbers."""

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

MAX_TIME_LIMIT: Final = 10 * 365 * 86_400
"""The longest time limit in seconds: ten years."""

MAX_MEMORY: Final = 2**30
"""The largest memory size in MiB: one PiB."""

_TIME_HELP: Final = (
    "a time limit is minutes (30 or 0.5), or text like '30', '1:30' (m:s), '2:00:00' (h:m:s), '1-12' (d-h), "
    "'1-12:30' (d-h:m), '1-12:30:00' (d-h:m:s), 'UNLIMITED'"
)
_MEMORY_HELP: Final = "memory is a number of MiB, or text like '512', '512M', '4G', '4GB', '1T'"

# The bounded repetition keeps a hostile number of digits away from int().
_NUMBER: Final = r"([0-9]{1,12})"
CLOCK: Final = re.compile(rf"{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?")
DAYS: Final = re.compile(rf"{_NUMBER}-{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?")
MEMORY: Final = re.compile(rf"{_NUMBER}(?:([kmgtKMGT])[bB]?)?")
_KIB: Final = {"k": 1, "m": 2**10, "g": 2**20, "t": 2**30}


def parse_time_limit(value: int | float | str) -> int | None:
    """Seconds of a time limit; None is no limit (0, ``UNLIMITED``, ``INFINITE``).

    A number is minutes and may have a fraction, rounded up to a whole second. Raises ValueError that says
    what would be right.
    """
    seconds = _text_seconds(value) if isinstance(value, str) else _number_seconds(value)
    if seconds > MAX_TIME_LIMIT:
        raise ValueError("a time limit is at most 10 years; 'UNLIMITED' means none")
    return seconds or None


def _number_seconds(minutes: int | float) -> int:
    if isinstance(minutes, bool) or not isinstance(minutes, int | float):
        raise ValueError(_TIME_HELP)
    if not 0 <= minutes <= MAX_TIME_LIMIT:  # NaN fails every comparison
        raise ValueError(f"{_TIME_HELP}; a number lies between 0 and 10 years")
    # By way of the shortest decimal: 1.1 minutes are 66 seconds, in binary a little more.
    return int((Decimal(repr(minutes)) * 60).to_integral_value(ROUND_CEILING))


def _text_seconds(text: str) -> int:
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return 0
    if found := DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if found := CLOCK.fullmatch(text):
        parts = [int(part) for part in found.groups() if part is not None]
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
        return (hours * 60 + minutes) * 60 + seconds
    raise ValueError(_TIME_HELP)


def format_time_limit(seconds: int | None) -> str:
    """Slurm's text of a limit in seconds; `parse_time_limit` reads it back: ``0:01:30``, ``1-02:00:00``."""
    if seconds is None:
        return "UNLIMITED"
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def parse_memory(value: int | str) -> int:
    """MiB of a memory size: a number is MiB, text may end in K, M, G or T; rounded up.

    Raises ValueError that says what would be right.
    """
    mebibytes = _text_memory(value) if isinstance(value, str) else value
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int):
        raise ValueError(_MEMORY_HELP)
    if not 1 <= mebibytes <= MAX_MEMORY:
        raise ValueError(f"{_MEMORY_HELP}; it lies between 1 MiB and 1024T")
    return mebibytes


def _text_memory(text: str) -> int:
    found = MEMORY.fullmatch(text)
    if found is None:
        raise ValueError(_MEMORY_HELP)
    number, unit = found.groups()
    return -(-int(number) * _KIB[(unit or "m").lower()] // 1024)
