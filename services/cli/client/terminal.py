"""What others wrote, on its way to a terminal: no control character of theirs gets there as such."""

import codecs
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing


def shown(text: str, allowed: str = "") -> str:
    """The text with whatever does not print spelled out, as \\x1b; `allowed` characters stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in allowed else c.encode("unicode_escape").decode() for c in text)


def complain(command: str, line: str) -> None:
    """One line on standard error, behind what was printed so far."""
    sys.stdout.flush()
    print(f"rowlock {command}: {shown(line)}", file=sys.stderr)


async def write_bytes(output: AsyncGenerator[bytes, None]) -> None:
    """Write each piece as it comes: as it is, but to a terminal as text that prints."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    terminal = sys.stdout.isatty()
    async with aclosing(output) as pieces:
        async for piece in pieces:
            if terminal:
                sys.stdout.write(shown(decoder.decode(piece), "\n\t"))
            else:
                sys.stdout.buffer.write(piece)
            sys.stdout.flush()
    if terminal:
        sys.stdout.write(decoder.decode(b"", final=True))


def write_text(text: str) -> None:
    """Write a text likewise."""
    if sys.stdout.isatty():
        sys.stdout.write(shown(text, "\n\t"))
    else:
        sys.stdout.buffer.write(text.encode())
