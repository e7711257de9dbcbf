"""``rowlock api``, ``python -m services.api``."""

import sys

from core.loading import loading


def main(argv: list[str] | None = None) -> int:
    """Run the API; answer the exit code."""
    with loading():
        import uvloop

        from core import role
        from services.api.serving import serve
    return role.run("api", serve, uvloop.new_event_loop, argv)


if __name__ == "__main__":
    sys.exit(main())
