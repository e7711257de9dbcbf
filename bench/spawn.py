"""The machine's own limit: scripts a second from a bare asyncio loop, and nothing around it.

`python -m bench.spawn --jobs N` starts `/bin/sh script` (the burst's own script), 8 at once, each in its own
session with stdin from /dev/null. It is the strictest such limit: one script file and one output file for
all, where Rowlock writes and opens them for each job.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.apart import BenchError, answer, own_cpu

SCRIPT = "#!/bin/sh\ntrue\n"
AT_ONCE = 8
WARM_UP = 50


def scripts_per_second(jobs: int, at_once: int) -> float:
    """Run the script `jobs` times after a warm-up."""
    with tempfile.TemporaryDirectory(prefix="rowlock-bench-") as folder:
        script = Path(folder, "script")
        script.write_text(SCRIPT)
        output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return asyncio.run(_rate(script, output, jobs, at_once))
        finally:
            os.close(output)


async def _rate(script: Path, output: int, jobs: int, at_once: int) -> float:
    await _run_all(script, output, WARM_UP, at_once)
    began = time.perf_counter()
    await _run_all(script, output, jobs, at_once)
    return jobs / (time.perf_counter() - began)


async def _run_all(script: Path, output: int, jobs: int, at_once: int) -> None:
    turns = iter(range(jobs))
    await asyncio.gather(*(_run_some(script, output, turns) for _ in range(at_once)))


async def _run_some(script: Path, output: int, turns: Iterator[int]) -> None:
    for _ in turns:
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            script,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        if await process.wait() != 0:
            raise BenchError("the script of the bare limit failed")


def use_pidfd_watcher() -> None:
    """The fastest that asyncio has: to be asked for up to Python 3.11, its default from 3.12 on."""
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def main() -> int:
    """The entry of `python -m bench.spawn`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    options = parser.parse_args()

    def work() -> object:
        use_pidfd_watcher()
        rate = scripts_per_second(options.jobs, options.at_once)
        return {"scripts_per_second": round(rate, 1), "cpu_seconds": round(own_cpu(), 3)}

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
