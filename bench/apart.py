"""One measurement in a process of its own, so that its CPU is its own and no import of ours weighs on it."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.standalone.child import spawn

ROOT = Path(__file__).resolve().parents[1]
READINGS = 10
LONGEST_CLOCK_STEP = 0.0005


class BenchError(Exception):
    """Nothing could be measured, or what was measured is void: one line."""


def measure(
    module: str, *words: object, seconds: float, python: str = sys.executable, env: Mapping[str, str] | None = None
) -> Any:
    """What `python -m module words…` answers (see `answer`). It is killed after `seconds`, and when we are."""
    with tempfile.TemporaryFile() as output:
        child = spawn(
            module,
            (python, "-m", module, *map(str, words)),
            env={**os.environ, **(env or {}), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
            dying=signal.SIGKILL,
            output=output.fileno(),
        )
        try:
            code = child.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{module} took more than {seconds:g} s") from None
        finally:
            child.process.kill()
            child.process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    if code != 0:
        raise BenchError(f"{module}: {last or f'ended with {code}'}")
    return json.loads(last)


def answer(work: Callable[[], object]) -> int:
    """Run a measurement's own process: print what it found as one line of JSON, or why it found nothing."""
    try:
        found = work()
    except (BenchError, TimeoutError) as error:
        print(str(error) or type(error).__name__)
        return 1
    print(json.dumps(found))
    return 0


def own_cpu() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def steady_clock() -> Iterator[None]:
    """Times of several processes are compared by the wall clock. Raises BenchError when it was set meanwhile."""
    before = _clock_offset()
    yield
    if abs(step := _clock_offset() - before) > LONGEST_CLOCK_STEP:
        raise BenchError(f"the run is void: the clock was set by {step * 1000:.1f} ms meanwhile")


def _clock_offset() -> float:
    """Of several readings the one in which least time passed: this process may be held up in the middle of any."""

    def reading() -> tuple[float, float]:
        before = time.monotonic()
        wall = time.time()
        after = time.monotonic()
        return after - before, wall - (before + after) / 2

    return min(reading() for _ in range(READINGS))[1]
