"""A line of the doctor's: what was looked at, what was found, and what would be right."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "fault"]
"""A warning names a risk or a cost; with a fault something does not work, or loses what was accepted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check, over and done."""

    verdict: Verdict
    what: str
    detail: str
    right: str = ""

    def __str__(self) -> str:
        right = f" ({self.right})" if self.right else ""
        return f"{self.verdict:<7}  {self.what:<22}  {self.detail}{right}"


def ok(what: str, detail: str) -> Finding:
    """As it should be."""
    return Finding("ok", what, detail)


def warning(what: str, detail: str, right: str) -> Finding:
    """A risk or a cost."""
    return Finding("warning", what, detail, right)


def fault(what: str, detail: str, right: str) -> Finding:
    """Something that does not work, or loses what was accepted."""
    return Finding("fault", what, detail, right)
