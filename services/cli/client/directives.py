"""The ``#SBATCH`` lines of a script, read as sbatch reads them."""

import argparse
import shlex
from collections.abc import Iterator
from typing import Any, NoReturn

from services.cli.client.arguments import Misuse, add_job_options
from services.cli.client.terminal import complain

MARK = "#SBATCH"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read(script: str, file: str, *, ignore_unknown: bool) -> dict[str, Any]:
    """The fields of the job that the lines ask for, a later line before an earlier one; Misuse for any other.

    With `ignore_unknown` what Rowlock does not have is passed over, with a warning.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_job_options(parser)
    said = argparse.Namespace()
    for number, line in _lines(script):
        where = f"{file}, line {number}"
        try:
            words = shlex.split(line, comments=True)
            _, unknown = parser.parse_known_args(words, said)
        except ValueError as error:
            raise Misuse(f"{where}: {error}") from None
        if unknown and not ignore_unknown:
            raise Misuse(f"{where}: Rowlock's jobs have no {unknown[0]}; --ignore-unknown passes over it")
        if unknown:
            complain("submit", f"{where}: passed over: {' '.join(unknown)}")
    return vars(said)


def _lines(script: str) -> Iterator[tuple[int, str]]:
    """Number and options of each line, up to the first command of the script."""
    for number, line in enumerate(script.split("\n"), 1):
        if line.startswith(MARK) and line[len(MARK) :][:1].isspace():
            yield number, line[len(MARK) :]
        elif line.strip() and not line.lstrip().startswith("#"):
            return
