"""What stays until told to stop: `rowlock up`, everything on one machine, and `rowlock infra`, its servers alone."""

import sys
from pathlib import Path

from core.errors import RowlockError
from core.settings import Settings, obsolete
from services.standalone.stack import (
    SERVERS_FILE,
    Orders,
    Plan,
    Stack,
    StackError,
    check_port,
    claim,
    free_port,
    obey_signals,
    plan_infra,
    plan_up,
    say_line,
)


async def up(settings: Settings, data_dir: Path, port: int, config: Path | None = None) -> int:
    """Run servers and roles until told to stop; the exit code. Every refusal is one line on stderr.

    Port 0 is any free one. `config` is the file that the settings were read from.
    """
    if warning := obsolete(config):
        print(f"rowlock up: {warning}", file=sys.stderr)
    say_line(f"settings: {f'{config}, under the environment' if config else 'the environment and the defaults'}")
    plan = plan_up(settings, _absolute(data_dir), port or free_port(), _absolute(config) if config else None)
    return await _stay("rowlock up", plan, f"ready: {plan.address} (Ctrl-C stops everything, in order)")


async def infra(data_dir: Path) -> int:
    """Run the embedded servers alone until told to stop; the exit code. Their addresses are in a settings file."""
    plan = plan_infra(_absolute(data_dir))
    file = plan.data_dir / SERVERS_FILE
    return await _stay("rowlock infra", plan, f"ready: `--config {file}` leads a role here (Ctrl-C stops both)")


async def _stay(command: str, plan: Plan, welcome: str) -> int:
    orders = Orders()
    obey_signals(orders)
    try:
        with claim(plan.data_dir, plan.port if plan.roles else None, command):
            if plan.roles:
                check_port(plan.settings.api_host, plan.port)
            await Stack(plan, say_line).run(orders, lambda: say_line(welcome))
            say_line("stopped")
    except StackError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return error.code
    except (RowlockError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return 0


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()
