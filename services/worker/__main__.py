"""``rowlock worker``, ``python -m services.worker``: the launcher; the worker itself is `kept`."""

import sys
from collections.abc import Sequence

from services.worker.keeper import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker under its keeper; answer the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        from services.worker.kept import main as kept

        return kept(list(arguments))
    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main())
