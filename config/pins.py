"""Renew the exact versions in pyproject.toml: `just pins`.

uv resolves the project anew, without the old pins, for every platform and Python that it may be installed on. Each
package gets one line, or one per version where they differ, with the environments that it is for. The same is done
for what builds the wheel. Only names and versions are taken over: where they came from stands in no file.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"
UV = shlex.split(os.environ.get("UV", "uv"))
# hatchling asks for it when it builds an editable wheel; no metadata says so.
BUILDS_BESIDE = ("editables",)

Packages = list[dict[str, Any]]


def main() -> None:
    text = PROJECT.read_text(encoding="utf-8")
    project = tomllib.loads(text)
    own = project["project"]["name"]
    builds = [*project["build-system"]["requires"], *BUILDS_BESIDE]
    pins = {
        "constraint-dependencies": locked(without_pins(text), own),
        "build-constraint-dependencies": locked(building(builds, project["project"]["requires-python"]), "building"),
    }
    for key, lines in pins.items():
        text = with_pins(text, key, lines)
        print(f"{key}: {len(lines)}")
    PROJECT.write_text(text, encoding="utf-8")


def without_pins(text: str) -> str:
    """The project as if nothing had been pinned."""
    for key in ("constraint-dependencies", "build-constraint-dependencies"):
        text = with_pins(text, key, [])
    return text


def with_pins(text: str, key: str, lines: list[str]) -> str:
    """The project with one of its lists replaced."""
    array = "".join(f"  {quoted(line)},\n" for line in lines)
    fresh, found = re.subn(
        rf"(?ms)^{key} = \[.*?\]$", lambda _: f"{key} = [\n{array}]" if array else f"{key} = []", text
    )
    if found != 1:
        sys.exit(f"pyproject.toml: there should be one `{key} = [`, there are {found}")
    return fresh


def quoted(line: str) -> str:
    """A TOML string; a marker holds single quotes alone."""
    return f'"{line}"'


def building(requires: list[str], python: str) -> str:
    """A project that needs what the build needs."""
    listed = ", ".join(f'"{line}"' for line in requires)
    return f'[project]\nname = "building"\nversion = "0"\nrequires-python = "{python}"\ndependencies = [{listed}]\n'


def locked(project: str, own: str) -> list[str]:
    """Resolve the project in a directory of its own; every package but itself, exact."""
    with tempfile.TemporaryDirectory(prefix="rowlock-pins-") as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(project, encoding="utf-8")
        shutil.copy(ROOT / "README.md", folder)
        if subprocess.run((*UV, "lock", "--quiet", "--project", str(folder))).returncode != 0:
            sys.exit("nothing was changed: uv could not resolve the project")
        lock = tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))
    return exact([package for package in lock["package"] if package["name"] != own])


def exact(packages: Packages) -> list[str]:
    """A requirement per package and version."""
    lines = []
    for package in packages:
        markers = package.get("resolution-markers", [])
        shown = [marker.replace('"', "'") for marker in markers]
        where = " or ".join(f"({marker})" if len(shown) > 1 else marker for marker in shown)
        lines.append(f"{package['name']}=={package['version']}" + (f" ; {where}" if where else ""))
    return sorted(lines)


if __name__ == "__main__":
    main()
