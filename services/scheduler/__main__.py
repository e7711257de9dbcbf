"""``rowlock scheduler``, ``python -m services.scheduler``."""

import sys

from core.loading import loading


def main(argv: list[str] | None = None) -> int:
    """Run the scheduler; answer the exit code."""
    with loading():
        import uvloop

        from core import role
        from services.scheduler.serve import serve
    return role.run("scheduler", serve, uvloop.new_event_loop, argv)


if __name__ == "__main__":
    sys.exit(main())
