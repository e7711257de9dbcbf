"""Tables: plain aligned text, and coloured on a terminal where rich is installed (the extra `cli`)."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from services.cli.client.terminal import shown

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "-"
GAP = 2
COLOURS = {
    **dict.fromkeys(("COMPLETED", "IDLE", "MIXED", "ALLOCATED"), "green"),
    **dict.fromkeys(("RUNNING", "CONFIGURING"), "cyan"),
    **dict.fromkeys(("PENDING", "CANCELLED", "DRAIN"), "yellow"),
    **dict.fromkeys(("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED", "DOWN"), "red"),
}
"""Of states. A node's may have flags behind it; the last that is here gives the colour."""


class Table:
    """Rows under a heading, which may come in several batches: each widens the columns for those after it."""

    def __init__(self, *heading: str) -> None:
        self._heading: tuple[str, ...] | None = heading
        self._widths = [len(title) for title in heading]

    def show(self, rows: Iterable[Sequence[object]]) -> None:
        """Print rows; None and the empty text are shown as a dash."""
        texts = [[_cell(value) for value in row] for row in rows]
        for row in texts:
            self._widths = [max(width, _width(text)) for width, text in zip(self._widths, row, strict=True)]
        heading, self._heading = self._heading, None
        if console := _console():
            self._show_in_colour(console, heading, texts)
            return
        if heading is not None:
            print(self._line(heading))
        for row in texts:
            print(self._line(row))

    def _line(self, row: Sequence[str]) -> str:
        padded = [text + " " * (width - _width(text) + GAP) for text, width in zip(row, self._widths, strict=True)]
        return "".join(padded).rstrip()

    def _show_in_colour(
        self, console: "Console", heading: Sequence[str] | None, texts: Sequence[Sequence[str]]
    ) -> None:
        from rich.table import Table as Rich
        from rich.text import Text

        table = Rich(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=heading is not None)
        for title, width in zip(heading or [""] * len(self._widths), self._widths, strict=True):
            table.add_column(title, min_width=min(width, console.width // 2), overflow="fold")
        for row in texts:
            # Text and no markup: what is in brackets is the job's own.
            table.add_row(*(Text(text, style=_colour(text)) for text in row))
        console.print(table)


def show_fields(document: Iterable[tuple[str, object]]) -> None:
    """Print the members of a document, a line each."""
    Table("FIELD", "VALUE").show(document)


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return NOTHING if value in (None, "") else shown(str(value))


def _width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _colour(text: str) -> str:
    found = [COLOURS[word] for word in text.split("+") if word in COLOURS]
    return found[-1] if found else ""


def _console() -> "Console | None":
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:  # a plain installation
        return None
    return Console(highlight=False)
