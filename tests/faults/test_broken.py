"""Every scenario is clean on the product as it is, and each defect is found by one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.broken import DEFECTS
from tests.faults.cluster import SERVERS
from tests.faults.scenarios import SCENARIOS, played

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path, with_cluster: Callable[[Path], Path]) -> Path:
    """Where a scenario is played."""
    with_cluster(tmp_path / SERVERS)
    return tmp_path


# Those that take a moment; the others are for the long tier.
BRIEF = ("group-alone", "acknowledge-first")
SHORT = ("a_newer_worker_registers_while_one_recovers",)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in SCENARIOS]
)
async def test_nothing_is_broken(name: str, folder: Path) -> None:
    assert {column: texts for column, texts in (await played(name, folder)).items() if texts} == {}


@pytest.mark.parametrize(
    "name", [name if name in BRIEF else pytest.param(name, marks=pytest.mark.long) for name in DEFECTS]
)
async def test_a_defect_is_found(name: str, folder: Path) -> None:
    found = await played(DEFECTS[name].scenario, folder, name)
    print(found)
    assert any(found.values())


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_fits_the_product(name: str) -> None:
    """The text that it replaces is there; else roles would not start, and what is found would not be the defect."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            DEFECTS[name].put()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
