"""The command line as a client: real processes, over HTTP, against a whole system."""

import argparse
import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from core.client import ClientError
from core.documents import JobDocument
from core.errors import SettingsError
from core.states import State
from services.cli import commands
from services.cli.client import address, arguments, directives, jobs, refusal, submit
from services.cli.client.arguments import Misuse
from services.cli.client.environment import exported
from services.cli.client.table import COLOURS, Table
from services.cli.client.terminal import shown
from services.cli.completion import completion
from services.standalone.stack import free_port
from services.worker.spool import signal_name
from tests.builders import a_node, register, settings_for
from tests.conftest import Databases
from tests.system import PATIENCE, PLAIN, ROOT, System, running, until

pytestmark = pytest.mark.anyio

CLI = (sys.executable, "-m", "services.cli")
HEAVY = ("aiohttp", "asyncio", "asyncpg", "hiredis", "pydantic", "redis", "rich", "structlog", "uvloop")
NOWHERE = "nowhere"
"""A partition whose one node is given nothing: its jobs wait."""
ESCAPE = "\x1b[31m"
BACKWARDS = "a\u202eb"
"""A name with what turns a terminal's line around; the API takes it."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[Any]:
        """JSON, a document a line."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs commands as a user would, at home in `folder`."""

    system: System
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        here = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
        # aiohttp reads all authorities of the machine as it is imported.
        return {**here, "SSL_CERT_FILE": os.devnull, "ROWLOCK_URL": self.system.api.address, **more}

    async def start(self, *words: str, **more: Any) -> asyncio.subprocess.Process:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = self.environment(**more.pop("env", {}))
        return await asyncio.create_subprocess_exec(*CLI, *words, cwd=self.folder, env=env, **{**pipes, **more})

    async def run(self, *words: str, stdin: str | None = None, **env: str) -> Done:
        process = await self.start(*words, env=env, stdin=None if stdin is None else subprocess.PIPE)
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate(None if stdin is None else stdin.encode())
        assert "Traceback" not in err.decode()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def on_a_terminal(self, *words: str, **env: str) -> str:
        """What a terminal is told."""
        ours, theirs = pty.openpty()
        try:
            process = await self.start(*words, env={"TERM": "xterm", "COLUMNS": "200", **env}, stdout=theirs)
        finally:
            os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            told = await asyncio.to_thread(_read_all, terminal)
        assert await process.wait() == 0
        return told.replace("\r\n", "\n")

    def script(self, *lines: str, name: str = "script.sh") -> str:
        (self.folder / name).write_text("\n".join(("#!/bin/bash", *lines, "")))
        return name


def _read_all(terminal: Any) -> str:
    told = b""
    while True:
        try:
            piece = terminal.read(65536)
        except OSError:  # nobody has it open any more
            piece = b""
        if not piece:
            return told.decode()
        told += piece


@pytest.fixture(scope="module")
async def a_system(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    folder = tmp_path_factory.mktemp("system")
    async with databases.one() as url, running(settings_for(url, redis_url, folder), folder) as found:
        connection = await asyncpg.connect(url)
        await register(connection, a_node("n0", partitions=(NOWHERE,)))
        await connection.close()
        await found.api.set_node_state("n0", "DRAIN", "for jobs to wait")
        yield found


@pytest.fixture
async def shell(a_system: System, tmp_path: Path) -> AsyncIterator[Shell]:
    yield Shell(a_system, tmp_path)
    async for job in a_system.api.all_jobs(state="PENDING"):
        await a_system.api.cancel(job["job_id"])
    await a_system.clear()


async def waiting(shell: Shell, **job: Any) -> int:
    """A job that waits for ever."""
    return (await shell.system.submit("#!/bin/sh\n", **{"partition": NOWHERE, **job}))["job_id"]


# --- submit


async def test_a_script_becomes_a_job(shell: Shell) -> None:
    file = shell.script(
        "#SBATCH --account=theirs --time 1:30  # a comment",
        "#SBATCH -c2 -n 1",
        '#SBATCH --comment "two words"',
        "# SBATCH --mem=1", "##SBATCH --mem=1",
        "echo",
        "#SBATCH --job-name=late",
        name="work.sh",
    )  # fmt: skip
    done = await shell.run("submit", file, "-A", "mine", "--export=A=1,HOME", "--requeue", "-p", NOWHERE)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Submitted batch job ")
    job_id = done.out.split()[-1]
    [job] = (await shell.run("job", job_id, "--json")).documents
    wanted = ("name", "account", "time_limit_seconds", "cpus", "comment", "requeue", "memory_per_node")
    assert [job[field] for field in wanted] == ["work.sh", "mine", 90, 2, "two words", True, None]
    assert (await shell.run("script", job_id)).out == (shell.folder / file).read_text()
    assert ["time_limit", "0:01:30"] in [line.split() for line in (await shell.run("job", job_id)).out.splitlines()]


async def test_from_standard_input_once_under_a_key(shell: Shell) -> None:
    command = ("submit", "-", "-A", "test", "-p", NOWHERE, "--key", "only-once", "--json")
    first, again = [await shell.run(*command, stdin="#!/bin/sh\n") for _ in range(2)]
    assert first.documents == again.documents
    assert (first.documents[0]["name"], first.documents[0]["state"]) == ("job", "PENDING")


async def test_a_job_sees_what_is_exported_and_nothing_else(shell: Shell) -> None:
    file = shell.script("echo $LOUD-$QUIET-$ROWLOCK_TOKEN", "env | grep -c QUIET")
    env = {"LOUD": "l", "QUIET": "q", "ROWLOCK_TOKEN": "t"}
    said, everything = await asyncio.gather(
        shell.run("submit", file, "-A", "test", "--follow", "--export", "LOUD", **env),
        shell.run("submit", file, "-A", "test", "--follow", "--export", "ALL,LOUD='a,b'", **env),
    )
    assert (said.out, said.code) == ("l--\n0\n", 1)
    assert (everything.out, everything.code) == ("a,b-q-\n1\n", 0)


async def test_the_exit_code_of_who_waits_is_that_of_the_job(shell: Shell) -> None:
    ends = {"true": 0, "exit 3": 3, "kill -KILL $$": 137, "kill -TERM $$": 143}
    done = await asyncio.gather(
        *(
            shell.run("submit", shell.script(line, name=f"{number}.sh"), "-A", "test", "--wait")
            for number, line in enumerate(ends)
        )
    )
    assert [each.code for each in done] == list(ends.values())
    assert done[0].err == ""
    job_id = done[1].out.removeprefix("Submitted batch job ").strip()
    assert done[1].err == f"rowlock submit: job {job_id}: FAILED (NonZeroExitCode)\n"


async def test_one_document_also_of_who_waits(shell: Shell) -> None:
    done = await shell.run("submit", shell.script("exit 4"), "-A", "test", "--wait", "--json")
    [job] = done.documents
    assert (done.code, job["state"], job["exit_code"]) == (4, "FAILED", 4)
    assert done.err.startswith(f"Submitted batch job {job['job_id']}\n")


async def test_ctrl_c_ends_the_waiting_quietly_and_not_the_job(shell: Shell) -> None:
    process = await shell.start("submit", shell.script("sleep 100"), "-A", "test", "--wait")
    assert process.stdout is not None
    job_id = int((await process.stdout.readline()).split()[-1])
    await shell.system.state_is(job_id, "RUNNING")
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
    assert (await shell.system.api.job(job_id))["state"] == "RUNNING"


async def test_what_is_refused_is_a_line_each_in_the_words_of_the_options(shell: Shell) -> None:
    file = shell.script("true")
    done = await shell.run("submit", file)
    assert (done.code, done.out, done.err) == (1, "", "rowlock submit: --account: required\n")
    done = await shell.run("submit", file, "-A", "test", "-t", "soon", "-N", "2", "--export", "SLURM_X=1")
    assert done.code == 1
    assert sorted(line.split(": ")[1] for line in done.err.splitlines()) == ["--export SLURM_X", "--nodes", "--time"]


async def test_an_unknown_directive_is_refused_unless_told_otherwise(shell: Shell) -> None:
    file = shell.script("#SBATCH -A test", "#SBATCH --mail-type=END", f"#SBATCH -p {NOWHERE}")
    done = await shell.run("submit", file)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "rowlock submit: script.sh, line 3: Rowlock's jobs have no --mail-type=END; --ignore-unknown passes over it\n"
    )
    done = await shell.run("submit", file, "--ignore-unknown")
    assert (done.code, done.err) == (0, "rowlock submit: script.sh, line 3: passed over: --mail-type=END\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["submit", "missing"], "missing: No such file or directory"),
        (["submit", "."], ".: Is a directory"),
        (["submit", "/dev/zero"], "/dev/zero: a script is at most 1 MiB"),
        (["submit", sys.executable], "a script is at most 1 MiB|is not UTF-8 text"),
        (["submit", __file__, "--export", "NOT_SET_HERE"], "--export: NOT_SET_HERE is not set here"),
        (["submit", __file__, "--follow", "--json"], "leave out --json"),
        (["submit", __file__, "-A", "\udcff"], "\\udcff should be UTF-8 text"),
        (["jobs", "--url", "localhost:8000"], "--url=localhost:8000: should be http://HOST:PORT"),
        (["jobs", "--url", "http://me:open-sesame@localhost"], "--url: should be http://HOST:PORT"),
        (["logs", "1", "-f", "--tail", "5"], "leave out --attempt and --tail"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exit_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROWLOCK_URL", raising=False)
    assert commands.run(words) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in line.split("|"))
    assert error.count("\n") == 1
    assert "sesame" not in error


@pytest.mark.parametrize(
    "words",
    [
        ["submit"],
        ["submit", "x", "--key", "two words"],
        ["submit", "x", "--cpus-per-task", "many"],
        ["job", "x"],
        ["job", "0"],
        ["job", "9" * 30],
        ["jobs", "--sta", "RUNNING"],
        ["jobs", "--state", "RUNNING,LOST"],
        ["jobs", "--all", "--limit", "5"],
        ["drain", "n1"],
        ["down", "n1"],
        ["completion", "fish"],
    ],
)
def test_a_wrong_command_line_is_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.run(words)
    assert ended.value.code == 2
    assert ": error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "fields"),
    [
        ("#SBATCH -J a\n#SBATCH --job-name=b\n", {"name": "b"}),
        ("#SBATCH\t--time 5\t\r\n", {"time_limit": "5"}),
        ("#SBATCH --comment='a # b' # c\n", {"comment": "a # b"}),
        ("#SBATCH --comment=a\\ b#c\n", {"comment": "a b"}),
        ("#SBATCH --requeue\n#SBATCH --no-requeue\n", {"requeue": False}),
        ("\n  \n# text\n#SBATCHES\n#SBATCH\n#SBATCH -n2\n", {"tasks": 2}),
        ("echo\n#SBATCH -n2\n", {}),
        ("  echo\n#SBATCH -n2\n", {}),
        (" #SBATCH -n2\n", {}),
        ("\x0c#SBATCH -n2\x0c#SBATCH -n3\n", {}),
    ],
)
def test_directives(lines: str, fields: dict[str, object]) -> None:
    assert directives.read(f"#!/bin/sh\n{lines}", "f", ignore_unknown=False) == fields


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("--comment='x", "No closing quotation"),
        ("-c many", "invalid int value: 'many'"),
        ("--time", "expected one argument"),
        ("--tim=5", "Rowlock's jobs have no --tim=5"),
        ("--gres=gpu:1", "Rowlock's jobs have no --gres=gpu:1"),
        ("--wait", "Rowlock's jobs have no --wait"),
        ("more", "Rowlock's jobs have no more"),
    ],
)
def test_wrong_directives(line: str, fault: str) -> None:
    with pytest.raises(Misuse, match=f"^f, line 2: .*{fault}"):
        directives.read(f"#!/bin/sh\n#SBATCH {line}\n", "f", ignore_unknown=False)


HERE = {"A": "1", "BASH_FUNC_x%%": "() {", "SLURM_JOB_ID": "7", "ROWLOCK_TOKEN": "secret", "BYTES": "\udcff"}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("NONE", {}),
        ("", {}),
        ("ALL", {"A": "1"}),
        ("A=2,ALL", {"A": "2"}),
        ("A", {"A": "1"}),
        ("X=,Y==", {"X": "", "Y": "="}),
        ("X='a,b',Y=\"c d\"", {"X": "a,b", "Y": "c d"}),
        ("X=C:\\d#e", {"X": "C:\\d#e"}),
        ("ROWLOCK_TOKEN", {"ROWLOCK_TOKEN": "secret"}),
    ],
)
def test_what_is_exported(said: str, found: dict[str, str]) -> None:
    assert exported(said, HERE) == found


@pytest.mark.parametrize("said", ["NONE,A=1", "ALL,NONE", "B", "X='a"])
def test_what_cannot_be_exported(said: str) -> None:
    with pytest.raises(
        ValueError, match=r"NONE should stand alone|B is not set here; say B=VALUE|No closing quotation"
    ):
        exported(said, HERE)


@pytest.mark.parametrize(
    ("state", "exit_code", "name", "code"),
    [
        ("COMPLETED", 0, None, 0),
        ("FAILED", 9, None, 9),
        ("FAILED", None, "SEGV", 139),
        ("FAILED", None, "RTMIN+2", 128 + signal.SIGRTMIN + 2),
        ("FAILED", None, None, 1),
        ("CANCELLED", 0, None, 1),
        ("CANCELLED", None, None, 1),
        ("TIMEOUT", None, "TERM", 143),
        ("NODE_FAIL", None, None, 1),
    ],
)
def test_the_exit_code_of_a_job(state: str, exit_code: int | None, name: str | None, code: int) -> None:
    job = {"state": state, "exit_code": exit_code, "signal": name}
    assert submit.exit_code_of(cast(JobDocument, job)) == code


def test_every_signal_has_the_number_it_came_with() -> None:
    assert [submit.signal_number(signal_name(number)) for number in range(1, 65)] == list(range(1, 65))


# --- jobs


async def test_jobs_are_listed_and_filtered(shell: Shell) -> None:
    made = [await waiting(shell, account="lists", name=f"n{number}") for number in range(3)]
    done = await shell.run("jobs", "--account", "lists", "--limit", "2")
    heading, *lines = done.out.splitlines()
    assert heading.split()[:5] == ["JOBID", "PARTITION", "NAME", "ACCOUNT", "STATE"]
    assert [line.split()[:5] for line in lines] == [
        [str(made[number]), NOWHERE, f"n{number}", "lists", "PENDING"] for number in (2, 1)
    ]
    assert done.err == "rowlock jobs: there are more: --all, or a larger --limit\n"
    [page] = (await shell.run("jobs", "--account", "lists", "--limit", "2", "--json")).documents
    assert page == await shell.system.api.jobs(account="lists", limit=2)
    [page] = (await shell.run("jobs", "--account", "lists", "--state", "pending", "--name", "n1", "--json")).documents
    assert [job["job_id"] for job in page["jobs"]] == [made[1]]


async def test_all_jobs_come_page_by_page(shell: Shell) -> None:
    many = [({"account": "many", "partition": NOWHERE}, "#!/bin/sh\n")] * (jobs.PAGE + 1)
    made = await shell.system.api.submit_many(many)
    done = await shell.run("jobs", "--account", "many", "--all", "--json")
    assert [len(page["jobs"]) for page in done.documents] == [jobs.PAGE, 1]
    done = await shell.run("jobs", "--account", "many", "--all")
    assert [line.split()[0] for line in done.out.splitlines()] == ["JOBID", *map(str, reversed(made))]
    assert done.err == ""


async def test_a_reader_that_has_seen_enough_is_no_fault(shell: Shell) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    assert await waiting(shell) < await waiting(shell)
    process = await shell.start("jobs", "--limit", "1", stdout=theirs)  # there are more, and nobody to be told
    os.close(theirs)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


async def test_each_job_is_cancelled_whatever_became_of_another(shell: Shell) -> None:
    one, other = await waiting(shell), await waiting(shell)
    done = await shell.run("cancel", str(one), "999999", str(other))
    assert (done.code, done.err) == (1, "rowlock cancel: there is no job 999999\n")
    assert done.out == f"job {one}: CANCELLED\njob {other}: CANCELLED\n"
    done = await shell.run("cancel", str(one), str(other), "--json")
    assert [job["job_id"] for job in done.documents] == [one, other]


async def test_a_running_job_is_being_ended(shell: Shell) -> None:
    job = await shell.system.submit("#!/bin/sh\nsleep 100\n")
    await shell.system.state_is(job["job_id"], "RUNNING")
    done = await shell.run("cancel", str(job["job_id"]))
    assert done.out == f"job {job['job_id']}: RUNNING, is being ended\n"


async def test_outputs(shell: Shell) -> None:
    script = f"#!/bin/bash\nprintf '{ESCAPE}out\\n\\xff\\t\\r\\n'\necho err >&2\n"
    job = await shell.system.run(script, standard_error="err")
    job_id = str(job["job_id"])
    process = await shell.start("logs", job_id)
    out, err = await process.communicate()
    assert (out, err) == (b"\x1b[31mout\n\xff\t\r\n", b"")
    assert (await shell.run("logs", job_id, "--stderr")).out == "err\n"
    assert (await shell.run("logs", job_id, "--tail", "3", "--attempt", "1", "--stderr")).out == "rr\n"
    done = await shell.run("logs", job_id, "--attempt", "2")
    assert (done.code, done.err.split(": ")[1]) == (1, "--attempt")
    assert await shell.on_a_terminal("logs", job_id) == "\\x1b[31mout\n\\xff\t\\r\n"
    assert "\x1b" not in await shell.on_a_terminal("script", job_id)
    assert "\x1b" in (await shell.run("script", job_id)).out


@pytest.mark.parametrize("follow", [(), ("--follow",)])
async def test_a_reader_that_has_seen_enough_of_an_output_is_no_fault(shell: Shell, follow: tuple[str, ...]) -> None:
    job = await shell.system.run("#!/bin/sh\nhead -c 5000000 /dev/zero\n")
    ours, theirs = os.pipe()
    process = await shell.start("logs", str(job["job_id"]), *follow, stdout=theirs)
    os.close(theirs)
    assert await asyncio.to_thread(os.read, ours, 1) == b"\0"
    os.close(ours)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


async def test_ctrl_c_ends_the_following_quietly(shell: Shell) -> None:
    job = await shell.system.submit("#!/bin/bash\necho one\nsleep 100\n")
    process = await shell.start("logs", "-f", str(job["job_id"]))
    assert process.stdout is not None
    assert await process.stdout.readline() == b"one\n"
    process.send_signal(signal.SIGINT)
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 130


async def test_an_output_is_followed_to_its_end(shell: Shell, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = await shell.system.submit(f"#!/bin/bash\necho one\nwhile [ ! -e {gate} ]; do sleep 0.05; done\necho two\n")
    process = await shell.start("logs", "-f", str(job["job_id"]))
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"one\n"
        gate.touch()
        assert await process.communicate() == (b"two\n", b"")
    assert process.returncode == 0


async def test_control_characters_never_reach_a_terminal(shell: Shell) -> None:
    job_id = await waiting(shell, account="evil", name=BACKWARDS, comment="a\nb\tc [red]d[/red]")
    for environment in ({"PYTHONPATH": f"{PLAIN}:{ROOT}"}, {"NO_COLOR": "1", "TERM": "dumb"}, {}):
        listed = await shell.on_a_terminal("jobs", "--account", "evil", **environment)
        assert "a\\u202eb" in listed
        assert "\u202e" not in listed
        assert ("\x1b[33mPENDING" in listed) is (not environment)
        whole = await shell.on_a_terminal("job", str(job_id), **environment)
        assert "a\\nb\\tc [red]d[/red]" in whole
    piped = await shell.run("jobs", "--account", "evil")
    assert "a\\u202eb" in piped.out
    done = await shell.run("node", "\x1b[31m")
    assert (done.code, "\x1b" in done.err) == (1, False)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\x9b\x7f\r\n\t", "\\x9b\\x7f\\r\\n\\t"),
        ("\u202e\u2028\ud800", "\\u202e\\u2028\\ud800"),
    ],
)
def test_what_is_shown(text: str, safe: str) -> None:
    assert shown(text) == safe


def test_columns_are_aligned_also_with_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("A", "B")
    table.show([("漢字", 1), ("e\u0301", None)])
    table.show([(["a", "b"], True), ("", False)])
    assert capsys.readouterr().out == "A     B\n漢字  1\ne\u0301     -\na,b   yes\n-     no\n"


def test_only_a_terminal_has_a_width(capsys: pytest.CaptureFixture[str]) -> None:
    Table("A", "B").show([("x" * 300, "y" * 300)])
    assert capsys.readouterr().out.splitlines()[1:] == ["x" * 300 + "  " + "y" * 300]


def test_every_state_has_a_colour() -> None:
    assert set(State) <= set(COLOURS)


@pytest.mark.parametrize(
    ("start", "end", "time"),
    [
        (None, None, None),
        ("2026-01-01T00:00:00.5Z", None, "0:00:59"),
        ("2026-01-01T00:00:00Z", "2026-01-03T00:00:01Z", "2-00:00:01"),
        ("2026-01-01T01:00:00Z", None, "0:00:00"),
    ],
)
def test_how_long_a_job_has_run(start: str | None, end: str | None, time: str | None) -> None:
    job = cast(JobDocument, {"start_time": start, "end_time": end})
    assert jobs.elapsed(job, datetime(2026, 1, 1, 0, 1, tzinfo=UTC)) == time


# --- nodes


async def test_a_node_is_taken_out_and_back_in(shell: Shell) -> None:
    heading, _, line = (await shell.run("nodes")).out.splitlines()
    assert heading.split()[:4] == ["NODE", "STATE", "CPUS", "ALLOC"]
    assert line.split()[:4] == ["n1", "IDLE", "4", "0"]
    try:
        done = await shell.run("drain", "n1", "--reason", "new fan")
        assert done.out.splitlines()[1].split() == ["n1", "IDLE+DRAIN", "4", "0", "new", "fan"]
        [node] = (await shell.run("node", "n1", "--json")).documents
        assert (node["state_flags"], node["reason"]) == (["DRAIN"], "new fan")
        [node] = (await shell.run("down", "n1", "--reason", "x", "--json")).documents
        assert node["state"] == "DOWN"
    finally:
        done = await shell.run("resume", "n1")
    assert done.out.splitlines()[1].split() == ["n1", "IDLE", "4", "0", "-"]
    [listed] = (await shell.run("nodes", "--json")).documents
    assert [node["name"] for node in listed["nodes"]] == ["n0", "n1"]
    done = await shell.run("node", "n9")
    assert (done.code, done.err) == (1, "rowlock node: there is no node n9\n")


# --- where the API is


async def test_an_api_that_is_away_has_an_exit_code_of_its_own(shell: Shell) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = await shell.run("jobs", ROWLOCK_URL=url)
    assert done.code == refusal.AWAY
    assert done.err.startswith(f"rowlock jobs: {url} cannot be reached: ")
    assert done.err.count("\n") == 1
    assert (await shell.run("jobs", "--url", shell.system.api.address, ROWLOCK_URL=url)).code == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's settings; nothing is said elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ROWLOCK_URL", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".config").mkdir()
    return tmp_path / ".config"


def test_where_the_api_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.address_of(None) == "http://127.0.0.1:8000"
    (home / "rowlock").write_text("# mine\n\n url = https://file/rowlock \n")
    assert address.address_of(None) == "https://file/rowlock"
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg/rowlock").write_text("url=http://xdg")
    monkeypatch.setenv("XDG_CONFIG_HOME", "xdg")
    assert address.address_of(None) == "https://file/rowlock"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert address.address_of(None) == "http://xdg"
    monkeypatch.setenv("ROWLOCK_URL", "http://environment")
    assert address.address_of(None) == "http://environment"
    assert address.address_of("http://[::1]:1") == "http://[::1]:1"


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"http://x",
            b"url = x",
            b"url = ",
            b"url = http://x y",
            b"url = http://x:y",
            b"url = http://[",
            b"token = t",
        ),
        *(b"url = ftp://x", b"url = http://", b"url = http://x?y", b"url=http://x\nurl=http://y", b"\xff", None),
    ],
)
def test_a_bad_file_is_one_line(content: bytes | None, home: Path) -> None:
    if content is None:
        (home / "rowlock").mkdir()
    else:
        (home / "rowlock").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        address.address_of(None)
    assert str(caught.value).startswith(str(home / "rowlock"))
    assert "\n" not in str(caught.value)


# --- what it costs


@pytest.mark.parametrize(
    ("words", "spared"),
    [
        (["--help"], HEAVY),
        (["jobs", "--help"], HEAVY),
        (["submit", "--help"], HEAVY),
        (["completion", "bash"], HEAVY),
        (["jobs", "--url", "http://127.0.0.1:1"], tuple(set(HEAVY) - {"aiohttp", "asyncio"})),
    ],
)
def test_nothing_heavy_is_imported_that_is_not_needed(words: list[str], spared: tuple[str, ...]) -> None:
    script = f"""
import sys
from services.cli.__main__ import main
try:
    main({words!r})
finally:
    print("heavy:", sorted(set({spared!r}) & set(sys.modules)))
"""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SSL_CERT_FILE": os.devnull}
    done = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


# --- completion


def completed(words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last of the words."""
    script = completion("bash", commands._parser())
    asked = f"""{script}
complete -p rowlock >&2
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_rowlock
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(("bash", "-c", asked), capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
    assert done.stderr == "complete -o default -F _rowlock rowlock\n"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["rowlock", "su"], ["submit"]),
        (["rowlock", "--ver"], ["--version"]),
        (["rowlock", "jobs", "--sta"], ["--state"]),
        (["rowlock", "jobs", "--state", "RUN"], ["RUNNING"]),
        (["rowlock", "jobs", "--state", "=", "RUN"], ["RUNNING"]),
        (["rowlock", "jobs", "--all", "--j"], ["--json"]),
        (["rowlock", "submit", "script.sh", "--ntasks-"], ["--ntasks-per-node"]),
        (["rowlock", "submit", "-o", ""], []),
        (["rowlock", "submit", "scr"], []),
        (["rowlock", "health", "sch"], ["scheduler"]),
        (["rowlock", "completion", ""], ["-h", "--help", "bash", "zsh"]),
        (["rowlock", "nonsense", ""], []),
    ],
)
def test_bash_completes(words: list[str], offered: list[str], tmp_path: Path) -> None:
    assert completed(words, tmp_path) == offered


def test_bash_knows_every_command(tmp_path: Path) -> None:
    found = completed(["rowlock", ""], tmp_path)
    (listed,) = (a for a in commands._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(listed.choices) < set(found)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_knows_every_option(shell: str) -> None:
    script = completion(shell, commands._parser())
    parser = argparse.ArgumentParser()
    arguments.add_job_options(parser)
    assert all(option in script for action in parser._actions for option in action.option_strings)
    assert "@WORDS@" not in script
    assert "@CASES@" not in script


# --- the client


async def test_an_output_that_is_cut_is_no_whole_one(shell: Shell) -> None:
    with pytest.raises(ClientError, match="there is no job 999999"):
        [piece async for piece in shell.system.api.output(999999)]
    job = await shell.system.run("#!/bin/sh\nhead -c 300000 /dev/zero\n")
    pieces = [piece async for piece in shell.system.api.output(job["job_id"], tail=200_001)]
    assert b"".join(pieces) == bytes(200_001)
    await until(shell.system.api.health, "the API is well")
