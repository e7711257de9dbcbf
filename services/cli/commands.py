"""The command line: what it says, and what each command starts.

Nothing but argparse is imported at first: what a command needs comes with the command, so that ``--help`` costs
nothing and a role's process holds only what the role needs. A traceback never reaches a person from here.
"""

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import __version__
from services.cli.client import arguments

if TYPE_CHECKING:
    from core.settings import Settings

ROLES = ("api", "scheduler", "worker")
DATA_DIR, PORT = Path(".rowlock"), 8000
EXIT_FAILURE = 1


def run(argv: list[str] | None = None) -> int:
    """Run one command; answer its exit code: 0, or another with a line that says why, 2 for settings and usage."""
    options, rest = parse(argv)
    try:
        code = _run(options, rest)
        sys.stdout.flush()
        gc.freeze()  # the interpreter's end would look through everything once more
    except BrokenPipeError:
        # Whoever read has seen enough; the flush at exit must not fail over it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return code


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and what comes after a role: that is for the role to read (core/role.py)."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ROLES:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="rowlock", description="Rowlock, an HTTP-first batch scheduler.")
    top.add_argument("--version", action="version", version=f"rowlock {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more)

    command("demo", "watch one job go its way on real servers, with nothing left behind")
    up = command("up", "run everything on this machine until Ctrl-C, with embedded servers where none is configured")
    _add_data_dir(up, f"default: the setting DATA_DIR, {DATA_DIR}")
    up.add_argument("--port", type=_port, metavar="N", help=f"of the API; default: the setting API_PORT, {PORT}")
    up.add_argument("--end-jobs", action="store_true", help="when stopped, end running jobs; else they go on")
    up.add_argument("--unsafe", action="store_true", help="also with a PostgreSQL that may lose what it has committed")
    _add_config(up)
    for role in ROLES:
        command(role, f"run the {role} alone", add_help=False)
    _add_config(command("migrate", "bring the database to this version's schema; needs the right to create"))
    audit = command("audit", "look for broken invariants in the live database; exit 1 when there are any")
    audit.add_argument("--json", action="store_true", help="as one JSON document")
    _add_config(audit)
    doctor = command("doctor", "tell what this node and its servers are fit for; exit 1 when something is at fault")
    doctor.add_argument("--json", action="store_true", help="as one JSON document")
    _add_config(doctor)
    health = command("health", "tell whether a role of this host is well; exit 1 when it is not")
    health.add_argument("role", choices=ROLES, metavar="ROLE", help=", ".join(ROLES))
    _add_config(health)
    _add_data_dir(command("infra", "run the embedded PostgreSQL and Redis alone until Ctrl-C"), f"default: {DATA_DIR}")
    arguments.add_to(command)
    completion = command(
        "completion", "print what completes this command line in a shell: . <(rowlock completion bash)"
    )
    completion.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash, zsh")
    return top


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="settings, KEY=VALUE lines")


def _add_data_dir(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--data-dir", type=Path, metavar="DIR", help=f"where everything is kept; {default}")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} should be a port, 0 (any free one) to 65535")
    return int(text)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from core.errors import RowlockError, SettingsError
    from core.machine import unsupported

    name = f"rowlock {options.command}"
    if problem := unsupported():
        return _refused(problem)
    try:
        return _start(options, rest)
    except BrokenPipeError:
        raise
    except SettingsError as error:
        return _refused(str(error), error.exit_code)
    except RowlockError as error:
        return _refused(f"{name}: {error}", error.exit_code)
    except OSError as error:
        return _refused(f"{name}: {error}")
    except Exception as error:  # noqa: BLE001  (a bug: one line all the same, with its place)
        return _refused(f"{name}: a bug of Rowlock's own: {type(error).__name__}: {error} ({_place(error)})")


def _start(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "demo":
        return _demo()
    if options.command == "up":
        return _up(options)
    if options.command == "infra":
        return _infra(options.data_dir or DATA_DIR)
    if options.command in ROLES:
        return _role(options.command, rest)
    if options.command == "completion":
        return _completion(options.shell)
    if "url" in options:
        return _client(options)
    return _operate(options)


def _demo() -> int:
    import asyncio

    from services.standalone.demo import demo

    return asyncio.run(demo())


def _up(options: argparse.Namespace) -> int:
    import asyncio

    from core.role import with_switches
    from services.standalone.up import up

    settings, file = _settings(options)
    settings = with_switches(settings, options)
    port = settings.api_port if options.port is None else options.port
    return asyncio.run(up(settings, options.data_dir or settings.data_dir, port, file))


def _infra(data_dir: Path) -> int:
    import asyncio

    from services.standalone.up import infra

    return asyncio.run(infra(data_dir))


def _role(role: str, argv: list[str]) -> int:
    if role == "api":
        from services.api.__main__ import main as run
    elif role == "scheduler":
        from services.scheduler.__main__ import main as run
    else:
        from services.worker.__main__ import main as run
    return run(argv)


def _client(options: argparse.Namespace) -> int:
    """A client of the API, at its `url`."""
    from core.loading import loading

    with loading():
        from services.cli.client.command import run
    return run(options)


def _completion(shell: str) -> int:
    from services.cli.completion import completion

    print(completion(shell, _parser()), end="")
    return 0


def _operate(options: argparse.Namespace) -> int:
    """What looks after a system: one look or one change, and it is over."""
    import asyncio

    settings, _ = _settings(options)
    if options.command == "migrate":
        from services.cli.migrate import migrate

        return asyncio.run(migrate(settings))
    if options.command == "audit":
        from services.cli.audit import audit

        return asyncio.run(audit(settings, as_json=options.json))
    if options.command == "doctor":
        from services.cli.doctor.command import doctor

        return asyncio.run(doctor(settings, as_json=options.json))
    from services.cli.health import health

    return asyncio.run(health(settings, options.role))


def _settings(options: argparse.Namespace) -> "tuple[Settings, Path | None]":
    from core.role import read_settings

    return read_settings(options.config)


def _refused(line: str, code: int = EXIT_FAILURE) -> int:
    print(line, file=sys.stderr)
    return code


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "nowhere" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
