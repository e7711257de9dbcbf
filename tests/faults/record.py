"""The record of a run: JSON lines, one a fault, one a look at the capacity, a header and a footer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was injected, and what it met: jobs and requests by what they were doing at that instant."""

    kind: str
    victim: str
    met: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def counts(self) -> bool:
        """Whether it met work."""
        return any(self.met.values())


@dataclass(slots=True)
class Record:
    """Writes what happens, as it happens; `file` is None for a run that nobody wants to keep."""

    file: TextIO | None = None
    began: float = field(default_factory=monotonic)
    struck: list[Struck] = field(default_factory=list)
    looks: int = 0
    over: int = 0
    """The most CPUs over a node's own at one look."""

    def header(self, **facts: Any) -> None:
        """What ran, where and how."""
        self._write({"header": facts})

    def fault(self, struck: Struck) -> None:
        """One fault."""
        self.struck.append(struck)
        self._write({"fault": {**asdict(struck), "counts": struck.counts}})

    def look(self, nodes: dict[str, tuple[int, int, int]]) -> None:
        """One look at the capacity: CPUs, `alloc_cpus` and the sum of the allocations, of each node."""
        self.looks += 1
        over = max((max(allocated, held) - cpus for cpus, allocated, held in nodes.values()), default=0)
        self.over = max(self.over, over)
        self._write({"look": list(nodes.values())})

    def footer(self, **verdicts: Any) -> None:
        """What came out."""
        self._write({"footer": verdicts})
        if self.file is not None:
            self.file.flush()

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            print(json.dumps({"t": round(monotonic() - self.began, 3), **line}), file=self.file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record; a last one that was cut short is left out."""
    with path.open(encoding="ascii") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
