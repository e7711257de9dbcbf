"""The asyncio worker as a process: what the keeper starts, and starts again."""

import sys

from core.loading import loading


def main(argv: list[str] | None = None) -> int:
    """Run the worker; answer the exit code. Where nobody keeps what runs on, this process does from now on."""
    with loading():
        from core import role
        from services.worker import keeper, process
        from services.worker.loop import new_event_loop
        from services.worker.serve import serve
    code = role.run("worker", serve, new_event_loop, argv)
    keeper.leave(scripts=process.has_scripts())
    return code


if __name__ == "__main__":
    sys.exit(main())
