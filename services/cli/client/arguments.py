"""What the clients' commands may be told. Nothing but argparse: ``--help`` imports this.

An option that becomes a field of a job, or a parameter of a query, is kept under the name that the API has for it.
"""

import argparse
from collections.abc import Callable

from core.errors import RowlockError
from core.states import State

NewCommand = Callable[..., argparse.ArgumentParser]

URL, DEFAULT_URL = "ROWLOCK_URL", "http://127.0.0.1:8000"
LARGEST_ID = 2**63 - 1
LONGEST_KEY = 255

_RAW = "to a terminal control characters are spelled out, as \\x1b; elsewhere (| cat) every byte is as it was written"
_EXITS = """exit codes: 0 done; 1 refused, or failed; 2 the command line, or a setting, is wrong;
75 the API is away, and the same may work in a moment; 130 Ctrl-C"""
_WAIT_EXITS = """with --wait and --follow, once the job is over: 0 COMPLETED; else the script's own exit code, or 128+N
when signal N ended it, and 1 when there is neither, or the script said 0 and the job was cancelled all the same"""


class Misuse(RowlockError):
    """The command line, or a script, says what cannot be meant."""

    exit_code = 2


def add_to(new: NewCommand) -> None:
    """Declare every command; `new` makes one, by its name and its help."""

    def command(name: str, help: str, *, json: bool = True, epilog: str = _EXITS) -> argparse.ArgumentParser:
        # No abbreviations: a later option must not change what a script means.
        parser = new(name, help, allow_abbrev=False, epilog=epilog)
        parser.add_argument(
            "--url", help=f"where the API is; else {URL}, else `url = …` in ~/.config/rowlock, else {DEFAULT_URL}"
        )
        if json:
            parser.add_argument("--json", action="store_true", help="the API's own document, on one line")
        return parser

    _submit(command("submit", "submit a script as a job", epilog=f"{_EXITS}; {_WAIT_EXITS}"))
    _jobs(command("jobs", "list jobs, the newest first"))
    _add_job(command("job", "show all that is known of a job"))
    _add_job(command("script", "print the script of a job as submitted", json=False, epilog=f"{_RAW}; {_EXITS}"))
    _logs(command("logs", "print the output of a job", json=False, epilog=f"{_RAW}; {_EXITS}"))
    cancel = command("cancel", "cancel jobs; what runs is ended")
    cancel.add_argument("job_ids", type=_job_id, nargs="+", metavar="ID")
    command("nodes", "list the nodes")
    _add_node(command("node", "show all that is known of a node"))
    _change(command("drain", "give a node no new work"), "shown to whoever wonders about the node", required=True)
    _change(command("resume", "take a node back in"), "for the API's log", required=False)
    down = command("down", "give a node no new work, and end what runs there")
    _change(down, "shown to whoever wonders about the node", required=True)


def _submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("file", metavar="FILE", help="the script, which begins with #!; - for standard input")
    add_job_options(submit.add_argument_group("the job, as with sbatch, also on #SBATCH lines of the script"))
    submit.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="pass over what of #SBATCH lines is not listed here, with a warning",
    )
    submit.add_argument(
        "--key", type=_key, help="Idempotency-Key: submitted under it again, also by another process, it is one job"
    )
    ends = submit.add_mutually_exclusive_group()
    ends.add_argument("--wait", action="store_true", help="until the job is over; answer its exit code")
    ends.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help=f"print its output as it is written, and answer its exit code; {_RAW}",
    )


def add_job_options(to: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Those that ``#SBATCH`` lines may hold as well. One that is not given leaves nothing behind."""

    def field(*options: str, dest: str, help: str, **more: object) -> None:
        to.add_argument(*options, dest=dest, help=help, default=argparse.SUPPRESS, **more)  # type: ignore[arg-type]

    field("-J", "--job-name", dest="name", metavar="NAME", help="default: the file's name")
    field("-A", "--account", dest="account", metavar="NAME", help="required, here or in the script")
    field("-p", "--partition", dest="partition", metavar="NAME", help="default: the first of the site")
    field("-c", "--cpus-per-task", dest="cpus_per_task", type=int, metavar="N", help="default: 1")
    field("-n", "--ntasks", dest="tasks", type=int, metavar="N", help="default: 1")
    field("--ntasks-per-node", dest="ntasks_per_node", type=int, metavar="N", help="the same, as a job has one node")
    field("-N", "--nodes", dest="nodes", metavar="1", help="a job has one node")
    field("-t", "--time", dest="time_limit", metavar="LIMIT", help="30 (minutes), 1:30 (m:s), 2:00:00, 1-12, UNLIMITED")
    field("--mem", dest="memory_per_node", metavar="SIZE", help="512 (MiB), 4G; stored, not scheduled yet")
    field("-o", "--output", dest="standard_output", metavar="PATTERN", help="default: slurm-%%j.out")
    field("-e", "--error", dest="standard_error", metavar="PATTERN", help="default: with the output")
    field("-D", "--chdir", dest="current_working_directory", metavar="DIR", help="default: a folder of the job's own")
    field(
        "--export",
        dest="environment",
        metavar="NAME=VALUE,…",
        help="a job sees only the variables given here, not those of this shell as with sbatch: NAME=VALUE, NAME (its "
        "value here), ALL (every one that is here, but ROWLOCK_* and SLURM_*), NONE; quote a value with a comma in it",
    )
    field("--comment", dest="comment", metavar="TEXT", help="shown with the job")
    field("--requeue", dest="requeue", action="store_const", const=True, help="run it again when its node is lost")
    field("--no-requeue", dest="requeue", action="store_const", const=False, help="the default")


def job_options() -> dict[str, str]:
    """The option of each field of a job."""
    parser = argparse.ArgumentParser(add_help=False)
    add_job_options(parser)
    return {action.dest: action.option_strings[-1] for action in reversed(parser._actions)}


def _jobs(jobs: argparse.ArgumentParser) -> None:
    state = jobs.add_argument(
        "--state", type=_states, metavar="STATE,…", help="only those in these states, such as PENDING,RUNNING"
    )
    state.completions = tuple(State)  # type: ignore[attr-defined]
    jobs.add_argument("--account", metavar="NAME", help="only those of an account")
    jobs.add_argument("--name", metavar="NAME", help="only those of this name")
    jobs.add_argument("--node", metavar="NAME", help="only those on a node, now or when they ran")
    many = jobs.add_mutually_exclusive_group()
    many.add_argument("--limit", type=int, metavar="N", help="this many, to 200; default: 50")
    many.add_argument("--all", action="store_true", help="all of them; with --json one document a page, each on a line")


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job_id", type=_job_id, metavar="ID")


def _logs(logs: argparse.ArgumentParser) -> None:
    _add_job(logs)
    logs.add_argument("--stderr", action="store_true", help="what was written to standard error")
    logs.add_argument("--attempt", type=int, metavar="N", help="of one attempt alone, from 1")
    logs.add_argument("--tail", type=int, metavar="BYTES", help="only the last of it")
    logs.add_argument("-f", "--follow", action="store_true", help="as it is written, until the job is over")


def _add_node(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NODE")


def _change(command: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    _add_node(command)
    command.add_argument("--reason", required=required, metavar="TEXT", help=help)


def _job_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19) or not 1 <= int(text) <= LARGEST_ID:
        raise argparse.ArgumentTypeError(f"{text!r} should be the number of a job")
    return int(text)


def _states(text: str) -> str:
    states = text.upper()
    if wrong := [word for word in states.split(",") if word not in State.__members__]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} should be among {', '.join(State)}")
    return states


def _key(text: str) -> str:
    if not 1 <= len(text) <= LONGEST_KEY or not all("!" <= character <= "~" for character in text):
        raise argparse.ArgumentTypeError(f"a key should be 1 to {LONGEST_KEY} visible ASCII characters")
    return text
