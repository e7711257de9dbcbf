"""``rowlock``, ``python -m services.cli``.

This module parses on every Python 3 that is about, and imports nothing before it is ready for a Ctrl-C.
"""

import sys

OLDEST_PYTHON = (3, 11)
EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130


def main(argv=None):  # type: (list[str] | None) -> int
    """Run one command; answer the exit code."""
    if sys.version_info < OLDEST_PYTHON:
        print("rowlock: Rowlock needs Python 3.11 or later; this is " + sys.version.split()[0], file=sys.stderr)
        return EXIT_FAILURE
    try:
        from services.cli.commands import run

        return run(argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
