"""The stack of one `rowlock demo`, a process of its own: `python -m services.standalone.throwaway`.

Its stdin is a lifeline: when the other end is gone, by whatever end, everything is stopped in order and the
temporary directory removed. On stdout it tells, a line each: `directory PATH`, `port N`, `ready`,
`failed WHY`. For `bench/`: `--cpus N` is the node's TOTAL_CPUS, and a `--directory` that is given is left alone.
"""

import argparse
import asyncio
import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.errors import RowlockError
from core.settings import Settings
from services.standalone.stack import Orders, Stack, free_port, obey_signals, plan_throwaway, say_line

NODE = "demo"
PR_SET_CHILD_SUBREAPER = 36


def demo_settings(folder: Path, port: int, cpus: int | None = None) -> Settings:
    """The defaults, whatever the environment says: the demo shows Rowlock, not somebody's settings."""
    plain = Settings.model_construct()
    changed: dict[str, Any] = {
        "data_dir": folder,
        "log_dir": folder / "logs",
        "node_name": NODE,
        "api_port": port,
        "heartbeat_seconds": 1.0,
        "kill_grace_seconds": 2.0,
        "end_jobs": True,
    }
    if cpus is not None:
        changed["total_cpus"] = cpus
    return plain.model_copy(update=changed)


async def run(cpus: int | None = None, given: Path | None = None) -> int:
    """Run the stack until the lifeline or a signal ends it; 1 when it failed before."""
    orders = Orders()
    obey_signals(orders)
    lifeline = asyncio.ensure_future(_lifeline(orders))
    folder = given or Path(tempfile.mkdtemp(prefix="rowlock-demo-"))
    try:
        say_line(f"directory {folder}")
        return await _stack(folder, orders, cpus)
    finally:
        lifeline.cancel()
        await asyncio.gather(lifeline, return_exceptions=True)
        await _sweep()
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)


async def _stack(folder: Path, orders: Orders, cpus: int | None) -> int:
    port = free_port()
    say_line(f"port {port}")
    (folder / "logs").mkdir()
    output = os.open(folder / "logs" / "roles.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        plan = plan_throwaway(demo_settings(folder, port, cpus), folder, port, output)
        await Stack(plan, lambda line: _note(output, line)).run(orders, lambda: say_line("ready"))
    except (RowlockError, OSError) as error:
        say_line(f"failed {error}")
        await orders.stop.wait()  # until whoever looks on has read the logs
        return 1
    finally:
        os.close(output)
    return 0


def _note(output: int, line: str) -> None:
    os.write(output, f"{line}\n".encode())


async def _lifeline(orders: Orders) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        await reader.read()
        orders.stop.set()
    finally:
        transport.close()


async def _sweep() -> None:
    """End what the roles left behind: as a subreaper we are the parent of every orphan."""
    deadline = time.monotonic() + 5
    while (found := _children()) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  (it does not wait)
        await asyncio.sleep(0.01)


def _children() -> list[int]:
    text = Path("/proc/self/task").joinpath(str(os.getpid()), "children")
    try:
        return [int(pid) for pid in text.read_text().split()]
    except OSError:  # a kernel built without that file
        return []


def main() -> int:
    """The entry of `python -m services.standalone.throwaway`."""
    parser = argparse.ArgumentParser(description="Run a stack in a temporary directory for as long as stdin is open.")
    parser.add_argument("--cpus", type=int, metavar="N", help="TOTAL_CPUS of its node")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="an empty one that is not removed afterwards")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code = asyncio.run(run(options.cpus, options.directory))
    gc.freeze()  # the interpreter's end would look through everything once more
    return code


if __name__ == "__main__":
    sys.exit(main())
