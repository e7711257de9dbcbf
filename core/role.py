"""What every role's process does alike: settings, log, event loop, signals, an orderly end."""

import argparse
import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from core import __version__, log
from core.errors import RowlockError, SettingsError
from core.machine import unsupported
from core.settings import DEFAULT_FILE, Settings, load, obsolete, settings_file

Role = Literal["api", "scheduler", "worker"]
Main = Callable[[Settings, asyncio.Event], Awaitable[None]]
NewLoop = Callable[[], asyncio.AbstractEventLoop]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
SWITCHES = ("end_jobs", "unsafe")
"""Settings that are options of the command line as well."""
UNSAFE_HELP = "also with a PostgreSQL that may lose what it has committed"


def arguments(role: Role, argv: list[str]) -> argparse.Namespace:
    """The command line of a role."""
    parser = argparse.ArgumentParser(prog=f"rowlock {role}", description=f"Run Rowlock's {role}.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, KEY=VALUE lines")
    parser.add_argument("--unsafe", action="store_true", help=UNSAFE_HELP)
    if role == "worker":
        parser.add_argument(
            "--end-jobs", action="store_true", help="when stopped, end running jobs instead of leaving them running"
        )
    return parser.parse_args(argv)


def run(role: Role, main: Main, new_loop: NewLoop, argv: list[str] | None = None) -> int:
    """Run a role until it is told to stop; answer the process's exit code.

    `main` gets the settings and an event that is set on SIGTERM or SIGINT. A RowlockError ends the process with one
    line.
    """
    try:
        return _run(role, main, new_loop, argv)
    except KeyboardInterrupt:  # before the loop took the signal over, or after it had let go
        return EXIT_INTERRUPTED


def _run(role: Role, main: Main, new_loop: NewLoop, argv: list[str] | None) -> int:
    if problem := unsupported():
        print(problem, file=sys.stderr)
        return EXIT_USAGE  # whoever keeps this role running need not try again
    options = arguments(role, sys.argv[1:] if argv is None else argv)
    try:
        settings, file = read_settings(options.config)
        settings = with_switches(settings, options)
        logger = log.configure(role, settings.log_dir, settings.log_level)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"LOG_DIR: {error}", file=sys.stderr)
        return EXIT_USAGE
    logger.info("role_starting", version=__version__, settings_file=str(file) if file else None)
    if warning := obsolete(file):
        logger.warning("setting_obsolete", message=warning)
    gc.freeze()  # what was imported stays: no collection looks through it again, nor does the one at the end
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_with_signals(main, settings))
    except RowlockError as error:
        logger.error("role_failed", error=str(error))
        return error.exit_code
    except BaseExceptionGroup as group:
        expected = group.subgroup(RowlockError)
        if expected is None or group.split(RowlockError)[1] is not None:
            logger.error("role_crashed", exc_info=group)
        else:
            first = _first(expected)
            logger.error("role_failed", error=str(first))
            return first.exit_code if isinstance(first, RowlockError) else EXIT_FAILURE
        return EXIT_FAILURE
    except Exception as error:
        logger.error("role_crashed", exc_info=error)
        return EXIT_FAILURE
    logger.info("role_stopped")
    return 0


def read_settings(given: Path | None) -> tuple[Settings, Path | None]:
    """The settings, and the file that stands under the environment; SettingsError with a line per fault."""
    try:
        return load(given), settings_file(given)
    except OSError as error:
        raise SettingsError(f"--config: {given or DEFAULT_FILE} cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise SettingsError(f"--config: {given or DEFAULT_FILE} is not UTF-8 text") from None


def with_switches(settings: Settings, options: argparse.Namespace) -> Settings:
    """The settings, and on top of them what the command line switches on."""
    return settings.model_copy(update={name: True for name in SWITCHES if getattr(options, name, False)})


async def _with_signals(main: Main, settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(settings, stop)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def until_stopped(stop: asyncio.Event, *duties: Awaitable[None]) -> None:
    """Run the duties in one task group until `stop` is set; a duty that raises takes the role down."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_awaited(duty)) for duty in duties]
        await stop.wait()
        for task in tasks:
            task.cancel()


async def _awaited(duty: Awaitable[None]) -> None:
    await duty
