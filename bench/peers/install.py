"""`python -m bench.peers install`: what PyPI has of the peers, in exact versions and an environment of their own.

With `--apt`, as root where apt is, also what Debian has; no service of it is started.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.apart import ROOT, BenchError

ENVIRONMENT = ROOT / ".bench" / "peers"
POLICY = Path("/usr/sbin/policy-rc.d")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DEBIAN = ("slurmctld", "slurmd", "slurmrestd", "slurm-client", "munge", "wrk")


def pins() -> dict[str, str]:
    """The versions in requirements.txt by name. Raises BenchError when one is not exact."""
    found: dict[str, str] = {}
    for line in REQUIREMENTS.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, exact, version = text.partition("==")
            if not exact:
                raise BenchError(f"{REQUIREMENTS.name} should pin {text} by ==")
            found[name] = version
    return found


def installed(package: str) -> str | None:
    """The version in the peers' environment."""
    names = [path.name for path in ENVIRONMENT.glob(f"lib/python*/site-packages/{package}-*.dist-info")]
    return names[0].removesuffix(".dist-info").partition("-")[2] if names else None


def install(*, apt: bool) -> None:
    """Install what can be had, and say in a line what cannot. Raises BenchError."""
    _run(sys.executable, "-m", "venv", "--clear", ENVIRONMENT)
    _run(ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", REQUIREMENTS)
    print(f"installed from PyPI: {', '.join(f'{name} {version}' for name, version in sorted(pins().items()))}")
    if not apt:
        print(f"not asked for: Debian's ({' '.join(DEBIAN)}); as root: python -m bench.peers install --apt")
    elif why := _no_apt():
        print(f"not installed: {' '.join(DEBIAN)}: {why}")
    else:
        with _no_service_started():
            _run("apt-get", "update", "--quiet=2")
            _run("apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", *DEBIAN)
        print(f"installed from Debian: {', '.join(DEBIAN)}")


def _no_apt() -> str:
    if shutil.which("apt-get") is None:
        return "no apt-get here; install them by the means of this system"
    return "" if os.geteuid() == 0 else "apt-get has to be run by root"


@contextmanager
def _no_service_started() -> Iterator[None]:
    """By Debian's own switch: the benchmark runs these daemons itself, in directories of its own."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def _run(*words: str | Path) -> None:
    done = subprocess.run(words, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if done.returncode != 0:
        raise BenchError(f"{' '.join(map(str, words[:4]))} … ended with {done.returncode}")
