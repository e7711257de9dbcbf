"""Starting, waiting for and ending scripts: real processes, none of which may be left."""

import asyncio
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.worker import environment, files, proc, process
from services.worker.loop import new_event_loop
from services.worker.proc import children, tag_of
from services.worker.process import LaunchFailed, LaunchShortage, Process
from services.worker.spool import Exit
from tests.builders import a_spec
from tests.system import ROOT

PATIENCE = 60.0
"""Seconds after which something that must come is called missing."""

PATH = "/usr/local/bin:/usr/bin:/bin"


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await main
        finally:
            left = list(process._scripts.values())
            for started in left:
                await end(started, 0)
        assert not left

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(bounded())


async def end(started: Process, grace: float) -> None:
    await process.end(started, grace)
    started.forget()


async def sweep(started: Process) -> None:
    await process.sweep(started)
    started.forget()


@contextmanager
def folder(path: Path | str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  nothing tells of another process
        await asyncio.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator["Job"]:
    made = Job(tmp_path)
    yield made
    left = made.alive()
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


class Job:
    """Starts scripts, and finds what is alive of them by something that the module knows nothing of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = uuid4().hex
        self.out = folder / "out"
        self.started = 0

    async def start(self, script: str, *, out: Path | None = None, **env: str) -> Process:
        self.started += 1
        fd = os.open(out or self.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with folder(self.folder) as cwd:
                return await process.start(
                    ["/bin/bash", "-c", script],
                    env={"PATH": PATH, "TEST_ID": self.id, **env},
                    cwd=cwd,
                    stdout_fd=fd,
                    stderr_fd=fd,
                    tag=tag_of(self.started, 1, self.id),
                    mark=f"{self.started}:1:{self.id}",
                )
        finally:
            os.close(fd)

    async def run(self, script: str) -> Exit:
        started = await self.start(script)
        exit_ = await started.wait()
        await sweep(started)
        return exit_

    def alive(self) -> list[int]:
        """Every live process with our variable or, had it cleared its environment, our id as its name."""
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            for file in ("environ", "cmdline"):
                with suppress(OSError), open(f"/proc/{name}/{file}", "rb") as text:
                    if self.id.encode() in text.read():
                        found.append(int(name))
        return found

    async def says(self, text: str, out: Path | None = None) -> None:
        path = out or self.out
        await until(lambda: path.exists() and text in path.read_text())


def test_exit_codes(job: Job) -> None:
    async def main() -> None:
        for batch in range(0, 256, 32):
            codes = range(batch, batch + 32)
            exits = await asyncio.gather(*(job.run(f"exit {code}") for code in codes))
            assert exits == [Exit(code, None) for code in codes]

    run(main())


@pytest.mark.parametrize("name", ["KILL", "TERM", "HUP", "INT", "PIPE", "XFSZ", "USR1", "RTMIN", "RTMIN+3"])
def test_signals(job: Job, name: str) -> None:
    async def main() -> None:
        assert await job.run(f"ulimit -c 0; kill -{name} $$") == Exit(None, name)

    run(main())


def test_segv_and_the_last_signal(job: Job) -> None:
    async def main() -> None:
        assert await job.run("ulimit -c 0; kill -SEGV $$") == Exit(None, "SEGV")
        assert await job.run("kill -64 $$") == Exit(None, "RTMIN+30")

    run(main())


def test_environment_and_descriptors_are_the_jobs_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "secret")
    kept = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(kept, True)

    async def main() -> None:
        assert await job.run("env; ls -l /proc/$$/fd; ps -o sid= -p $$; echo $$; pwd") == Exit(0, None)

    try:
        run(main())
    finally:
        os.close(kept)
    text = job.out.read_text()
    assert "secret" not in text
    assert f"ROWLOCK_JOB=1:1:{job.id}" in text
    links = [line.split()[-3] for line in text.splitlines() if " -> " in line]
    assert set(links) <= {"0", "1", "2", "255"}
    session, pid, folder = text.splitlines()[-3:]
    assert session.strip() == pid
    assert folder == str(job.folder.resolve())


def test_the_mark_cannot_be_overridden(job: Job) -> None:
    async def main() -> None:
        started = await job.start("echo $ROWLOCK_JOB", ROWLOCK_JOB="7:7:x")
        await started.wait()
        await sweep(started)

    run(main())
    assert job.out.read_text() == f"1:1:{job.id}\n"


def test_signals_are_default_and_unblocked_even_under_nohup(job: Job) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGQUIT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    for number in before:
        signal.signal(number, signal.SIG_IGN)

    async def main() -> None:
        await job.run("grep -E 'Sig(Blk|Ign)' /proc/self/status; yes | head -1; echo ${PIPESTATUS[0]}")

    try:
        run(main())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    words = job.out.read_text().split()
    ignored = int(words.pop(3), 16) & ~0x180000000  # 32 and 33 are glibc's own, which posix_spawn ignores
    assert (words, ignored) == (["SigBlk:", "0" * 16, "SigIgn:", "y", "141"], 0)


def test_stdin_is_at_its_end(job: Job) -> None:
    async def main() -> None:
        assert await job.run("cat; read line || exit 9") == Exit(9, None)

    run(main())


def test_much_output(job: Job) -> None:
    async def main() -> None:
        assert await job.run("head -c 100000000 /dev/zero") == Exit(0, None)

    run(main())
    assert job.out.stat().st_size == 100_000_000


def test_a_folder_by_its_descriptor(job: Job) -> None:
    async def main() -> None:
        with files.Places([job.folder]) as places:
            folder = places.folder(str(job.folder / "work"))
            (job.folder / "work").rename(job.folder / "moved")
            (job.folder / "work").symlink_to("/")
            started = await process.start(
                ["/bin/sh", "-c", "echo here > file"], env={}, cwd=folder, stdout_fd=2, stderr_fd=2, tag=1, mark="m"
            )
        assert await started.wait() == Exit(0, None)
        await sweep(started)

    run(main())
    assert (job.folder / "moved/file").read_text() == "here\n"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cwd": "/etc/passwd"}, "working directory"),
        ({"command": ["/no/such/program"]}, "/no/such/program cannot be started"),
        ({"command": ["/etc/passwd"]}, "cannot be started"),
        ({"command": ["/bin/true", "a\0b"]}, "cannot be passed on"),
        ({"env": {"A": "x" * 5_000_000}}, "larger than the system allows"),
    ],
)
def test_what_cannot_be_started(job: Job, change: dict[str, Any], why: str) -> None:
    async def main() -> None:
        given: dict[str, Any] = {"command": ["/bin/true"], "env": {}, "cwd": "/", **change}
        with folder(given.pop("cwd")) as cwd, pytest.raises(LaunchFailed, match=why) as caught:
            await process.start(given.pop("command"), **given, cwd=cwd, stdout_fd=2, stderr_fd=2, tag=1, mark="m")
        assert not isinstance(caught.value, LaunchShortage)

    run(main())


def test_a_shortage_may_be_tried_again(job: Job) -> None:
    async def main() -> None:
        with folder("/") as cwd, _no_descriptor_free(), pytest.raises(LaunchShortage, match="open files"):
            await process.start(["/bin/true"], env={}, cwd=cwd, stdout_fd=2, stderr_fd=2, tag=1, mark="m")
        assert await job.run("exit 3") == Exit(3, None)

    run(main())


MAKES_A_LOOP = """
import os, resource, sys
from services.worker.loop import new_event_loop
free = os.open("/", os.O_RDONLY)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + int(sys.argv[1]), free + 10))
try:
    new_event_loop()
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("free", range(4))
def test_a_loop_that_would_lack_descriptors_is_an_error_and_no_abort(free: int) -> None:
    made = subprocess.run(
        [sys.executable, "-c", MAKES_A_LOOP, str(free)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (made.returncode, made.stdout) == (0, "Too many open files\n")


@contextmanager
def _no_descriptor_free() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_end_is_a_sigterm_first(job: Job) -> None:
    async def main() -> None:
        started = await job.start("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.01; done")
        await job.says("up")
        await end(started, PATIENCE)
        assert await started.wait() == Exit(5, None)

    run(main())
    assert "bye" in job.out.read_text()


def test_a_trapped_sigterm_ends_in_sigkill(job: Job) -> None:
    async def main() -> None:
        started = await job.start("trap '' TERM; (sleep 1000 & wait) & echo up; while :; do sleep 0.01; done")
        await job.says("up")
        await end(started, 0.1)
        assert await started.wait() == Exit(None, "KILL")

    run(main())


def test_the_whole_group_has_the_grace(job: Job) -> None:
    async def main() -> None:
        child = "trap 'sleep 0.3; echo saved; exit' TERM; echo up; while :; do sleep 0.01; done"
        started = await job.start(f"bash -c {shlex.quote(child)}; true")
        await job.says("up")
        await end(started, PATIENCE)
        assert await started.wait() == Exit(None, "TERM")

    run(main())
    assert "saved" in job.out.read_text()


def test_a_stopped_script_is_ended(job: Job) -> None:
    async def main() -> None:
        started = await job.start("trap 'exit 6' TERM; echo up; kill -STOP $$; while :; do sleep 0.01; done")
        await until(lambda: Path(f"/proc/{started.pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
        await end(started, PATIENCE)
        assert await started.wait() == Exit(6, None)

    run(main())


LEFTOVERS = {
    "group": "sleep 1000 & echo up",
    "ignores": "(trap '' TERM HUP; echo up; sleep 1000) & ",
    "stopped": "sleep 1000 & kill -STOP $!; echo up",
    "setsid": "setsid sleep 1000 & echo up",
    "daemon": "(setsid bash -c 'echo up; sleep 1000 & disown; exit' &)",
    "nested": "setsid bash -c 'setsid bash -c \"setsid sleep 1000 & sleep 1000\" & sleep 1000' & echo up",
    "job control": "set -m; sleep 1000 & sleep 1000 | sleep 1000 & echo up",
    "cleared": "env -i setsid bash -c 'exec -a $ID sleep 1000' & echo up",
    "cleared, session kept": "env -i bash -c 'exec -a $ID sleep 1000' >/dev/null 2>&1 & echo up",
    "cleared and silent": "env -i setsid bash -c 'exec -a $ID sleep 1000' >/dev/null 2>&1 & echo up",
    "untagged": "ulimit -x unlimited; setsid sleep 1000 & echo up",
    "untagged, cleared": "ulimit -x unlimited; env -i setsid bash -c 'exec -a $ID sleep 99' &>/dev/null & echo up",
    "cleared, double fork": "(env -i setsid bash -c '(exec -a $ID sleep 9999) & :' &>/dev/null &); echo up",
    "forks for ever": "setsid bash -c 'f() { sleep 0.01; f & }; for i in 1 2 3 4; do f & done' & echo up",
}


@pytest.mark.parametrize("script", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_nothing_is_left_after_the_script(job: Job, script: str) -> None:
    async def main() -> None:
        started = await job.start(script.replace("$ID", job.id))
        await started.wait()
        await job.says("up")
        await sweep(started)
        assert not job.alive()

    run(main())


@pytest.mark.parametrize("script", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_nothing_is_left_of_a_job_that_is_ended(job: Job, script: str) -> None:
    async def main() -> None:
        started = await job.start(f"trap '' TERM; {script.replace('$ID', job.id)}\nwhile :; do sleep 0.01; done")
        await job.says("up")
        await end(started, 0.05)
        assert await started.wait() == Exit(None, "KILL")
        assert not job.alive()

    run(main())


LEADERLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended_is_not_dead(job: Job) -> None:
    """The kernel calls it a zombie, but it runs, and nobody can reap it."""

    async def main() -> None:
        started = await job.start(f"setsid {sys.executable} -c {shlex.quote(LEADERLESS)} & echo up; sleep 1000")
        await job.says("up")
        await until(lambda: any(_is_leaderless(pid) for pid in proc.all_pids()))
        await end(started, 0)
        assert not any(_is_leaderless(pid) for pid in proc.all_pids())

    def _is_leaderless(pid: int) -> bool:
        stat = proc.read_stat(pid)
        threads = Path(f"/proc/{pid}/task")
        tag = tag_of(1, 1, job.id)
        return stat is not None and stat.state == "Z" and proc.read_tag(pid) == tag and len(list(threads.iterdir())) > 1

    run(main())


def test_a_neighbour_keeps_its_own(job: Job) -> None:
    """Two jobs with escapees: the one that ends takes its own along, and not the other's."""

    async def main() -> None:
        outs = [job.folder / "a", job.folder / "b"]
        line = "setsid sleep 1000 & env -i setsid bash -c 'exec -a $ID sleep 1000' & echo up; sleep 1000"
        first, second = [await job.start(line.replace("$ID", job.id), out=out) for out in outs]
        for out in outs:
            await job.says("up", out)
        await until(lambda: len(job.alive()) >= 6)
        both = set(job.alive())
        await end(first, 0.05)
        rest = set(job.alive())
        assert second.running
        assert len(rest) * 2 == len(both)
        await end(second, 0.05)

    run(main())


def test_what_nobody_can_be_proven_to_own_goes_with_the_last_job(job: Job) -> None:
    async def main() -> None:
        first = await job.start("sleep 1000")
        hidden = f"(env -i setsid bash -c 'exec -a {job.id} sleep 1000' >/dev/null 2>&1 &); echo up"
        second = await job.start(hidden)
        await second.wait()
        await job.says("up")
        await sweep(second)
        assert first.running
        await end(first, 0)
        assert not job.alive()

    run(main())


def test_a_hundred_jobs_with_grandchildren(job: Job) -> None:
    ours = set(children(os.getpid()))  # the tests' servers

    async def one(number: int) -> None:
        script = f"setsid sleep 1000 & (setsid bash -c 'sleep 1000' &) ; sleep 1000 & exit {number}"
        started = await job.start(script)
        assert await started.wait() == Exit(number, None)
        await sweep(started)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(100)))
        assert not job.alive()
        process.reap_orphans()
        assert set(children(os.getpid())) <= ours

    run(main())


def test_own_children_are_all_that_there_are(job: Job) -> None:
    """Also more than fit a page of their list, also those that fall to us, and whatever threads there are."""
    many = 700

    async def main() -> None:
        done = threading.Event()
        threads = [threading.Thread(target=done.wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        before = set(children(os.getpid()))
        pids = [os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}) for _ in range(many)]  # noqa: ASYNC221
        started = await job.start("(setsid sleep 1000 &); (setsid sleep 1000 &); echo up")
        try:
            await job.says("up")
            await until(lambda: len(set(children(os.getpid())) - before) == many + 3)
            assert sorted(proc.own_children()) == sorted(children(os.getpid()))
            assert set(pids) < set(proc.own_children())
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)  # noqa: ASYNC222
            await sweep(started)
            done.set()
            for thread in threads:
                thread.join()
        assert set(proc.own_children()) == before

    run(main())


def test_orphans_of_a_running_job_are_reaped(job: Job) -> None:
    ours = set(children(os.getpid()))  # the tests' servers

    async def main() -> None:
        started = await job.start("for i in 1 2 3 4 5 6 7 8; do (setsid true &); done; echo up; sleep 1000")
        await job.says("up")
        while set(children(os.getpid())) - ours != {started.pid}:
            process.reap_orphans()
            await asyncio.sleep(0.01)
        assert started.running
        await end(started, 0)

    run(main())


def test_children_of_ours_that_are_no_jobs_are_left_alone(job: Job) -> None:
    async def main() -> None:
        with subprocess.Popen(["/bin/sleep", "1000"]) as other:  # noqa: ASYNC220
            assert await job.run("setsid sleep 1000 &") == Exit(0, None)
            assert other.poll() is None
            other.terminate()

    run(main())


def test_without_the_list_of_children(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without CONFIG_PROC_CHILDREN: the answer is found in all of /proc."""
    real: Callable[..., Any] = open

    def without(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith("/children"):
            raise FileNotFoundError(path)
        return real(path, *args, **more)

    monkeypatch.setattr(proc, "open", without, raising=False)
    monkeypatch.setattr(proc, "_lists_children", lambda: False)

    async def main() -> None:
        assert await job.run("setsid sleep 1000 & sleep 1000 & exit 4") == Exit(4, None)
        assert not job.alive()

    run(main())


def test_a_clean_end_is_one_look(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing left: no pause and no second look, whatever other jobs are doing."""
    looks = 0
    real = Process.kill_leftovers

    def counting(started: Process) -> bool:
        nonlocal looks
        looks += 1
        return real(started)

    monkeypatch.setattr(Process, "kill_leftovers", counting)

    async def main() -> None:
        other = await job.start("setsid sleep 1000 & sleep 1000", out=job.folder / "other")
        for _ in range(20):
            await job.run("true")
        assert looks == 20
        await end(other, 0)

    run(main())


HOST = environment.Host(node="n1", hostname="h", spool_id="s", path=PATH, home="/home/u", user="u", uid=1, gid=2)


def test_environment_of_a_plain_job() -> None:
    env = environment.job_environment(a_spec(), host=HOST, directory="/work")
    assert env["ROWLOCK_JOB"] == "7:2:s"
    assert env["SLURM_JOB_CPUS_PER_NODE"] == "6"
    assert env["SLURM_JOB_START_TIME"] == "1000"
    given = {"CPUS_PER_TASK", "NTASKS_PER_NODE", "MEM_PER_NODE", "RESTART_COUNT", "JOB_END_TIME", "TASK_PID"}
    assert not {f"SLURM_{name}" for name in given} & env.keys()


def test_environment_of_a_job_that_asked_for_everything() -> None:
    spec = a_spec(
        cpus_per_task_given=True, tasks_per_node_given=True, memory_mib=64, restart_cnt=1,
        time_limit_seconds=90,
        environment={"PATH": "/mine", "SLURM_JOB_ID": "0", "ROWLOCK_JOB": "x", "A": "b"},
    )  # fmt: skip
    env = environment.job_environment(spec, host=HOST, directory="/work")
    assert (env["PATH"], env["SLURM_JOB_ID"], env["ROWLOCK_JOB"], env["A"]) == ("/mine", "7", "7:2:s", "b")
    given = ("CPUS_PER_TASK", "NTASKS_PER_NODE", "MEM_PER_NODE", "RESTART_COUNT", "JOB_END_TIME")
    assert [env[f"SLURM_{name}"] for name in given] == ["3", "2", "64", "1", "1090"]
