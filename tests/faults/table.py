"""The README's table, from one record or several: `python -m tests.faults.table RECORD...`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.faults import KINDS
from tests.faults.record import read
from tests.faults.verdicts import COLUMNS

NOT_RUN = "not run"


@dataclass(slots=True)
class Totals:
    """What records say together."""

    injected: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)
    impossible: dict[str, str] = field(default_factory=dict)
    looks: int = 0
    jobs: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    """Records without a footer: what came out is not known."""
    seeds: list[str] = field(default_factory=list)
    minutes: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether everything came to its end, and nothing is broken."""
        return not self.unfinished and not +self.broken


def total(records: Iterable[Iterable[dict[str, Any]]]) -> Totals:
    """Add records up."""
    found = Totals()
    for lines in records:
        ended = False
        for line in lines:
            if "look" in line:
                found.looks += 1
            elif "fault" in line:
                found.injected[line["fault"]["kind"]] += 1
                found.counted[line["fault"]["kind"]] += line["fault"]["counts"]
            elif "header" in line:
                found.seeds.append(str(line["header"]["seed"]))
                found.impossible.update(line["header"]["impossible"])
            elif "footer" in line:
                ended = True
                found.jobs += line["footer"]["jobs"]
                found.broken.update(line["footer"]["broken"])
                found.minutes += line["t"] / 60
        found.unfinished += not ended
    return found


def rendered(found: Totals) -> Iterator[str]:
    """The table in Markdown. What was not injected is `not run`, and never 0."""
    yield "| fault | injected | while it met work |"
    yield "| --- | ---: | ---: |"
    for kind in KINDS:
        if found.injected[kind]:
            yield f"| {kind} | {found.injected[kind]:,} | {found.counted[kind]:,} |"
        else:
            why = f" ({found.impossible[kind]})" if kind in found.impossible else ""
            yield f"| {kind} | {NOT_RUN}{why} | |"
    yield ""
    columns = ["jobs run", "looks at the capacity", *COLUMNS]
    verdicts = [NOT_RUN if found.unfinished else f"{found.broken[column]:,}" for column in COLUMNS]
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join(['---:'] * len(columns))} |"
    yield f"| {' | '.join([f'{found.jobs:,}', f'{found.looks:,}', *verdicts])} |"


def main() -> int:
    """Print the table of the records that are named; 1 when it is not all zeros."""
    parser = argparse.ArgumentParser(description="Print the table of records.")
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    found = total(read(path) for path in parser.parse_args().records)
    print("\n".join(rendered(found)))
    print(f"\n{found.minutes:.0f} minutes, seed {', '.join(found.seeds)}")
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main())
