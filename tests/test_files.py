"""Output files below allowed folders, scripts and their interpreters; no symbolic link is followed."""

import fcntl
import itertools
import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from services.worker import files
from services.worker.files import FileRefused
from services.worker.process import LaunchFailed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def put(root: Path, path: Path, text: str, *, append: bool = False) -> None:
    with files.Places([root]) as places:
        os.write(places.output(str(path), append=append), text.encode())


def open_output(root: Path, path: Path | str) -> None:
    """Open an output file, and close it."""
    with files.Places([root]) as places:
        places.output(str(path), append=False)


def make_folder(root: Path, path: Path) -> None:
    with files.Places([root]) as places:
        places.folder(str(path))


def test_missing_folders_are_made(root: Path) -> None:
    put(root, root / "a/b/out", "x")
    assert (root / "a/b/out").read_text() == "x"


def test_truncates_or_appends(root: Path) -> None:
    path = root / "out"
    put(root, path, "one")
    put(root, path, "two", append=True)
    assert path.read_text() == "onetwo"
    put(root, path, "three")
    assert path.read_text() == "three"


def test_how_long_an_output_is_before_more_is_appended(root: Path) -> None:
    """To look makes nothing; whatever may be appended to may be looked at."""
    path = root / "a/b/out"
    assert files.length([root], str(path)) is None
    assert not (root / "a").exists()
    put(root, path, "one")
    path.chmod(0o200)
    assert files.length([root], str(path)) == 3
    assert files.length([root], files.NULL) is None
    (root / "link").symlink_to(path)
    for wrong in (root / "link", root / "a/b", root.parent / "outside/x"):
        with pytest.raises(FileRefused):
            files.length([root], str(wrong))


def test_the_job_gets_an_ordinary_descriptor(root: Path) -> None:
    for _ in ("made", "found"):
        with files.Places([root]) as places:
            fd = places.output(str(root / "out"), append=False)
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
            assert not os.get_inheritable(fd)


@pytest.mark.parametrize("path", ["/etc/passwd", "relative", "/", "{root}/../outside/x", "{root}", "{root}x/y"])
def test_outside_is_refused(root: Path, path: str) -> None:
    with pytest.raises(FileRefused):
        open_output(root, path.format(root=root))
    with pytest.raises(FileRefused):
        files.open_for_reading([root], path.format(root=root))
    assert not list((root.parent / "outside").iterdir())


@pytest.mark.parametrize("path", ["link/x", "link/new/x", "file-link", "dangling", "loop/x"])
def test_links_are_not_followed(root: Path, path: str) -> None:
    outside = root.parent / "outside"
    (outside / "secret").write_text("secret")
    (root / "link").symlink_to(outside)
    (root / "file-link").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "new")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(FileRefused, match="symbolic link"):
        open_output(root, root / path)
    with pytest.raises(FileRefused):
        files.open_for_reading([root], str(root / path))
    with pytest.raises(FileRefused):
        make_folder(root, root / path)
    assert [p.name for p in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "secret"


def test_a_root_may_be_a_link_itself(root: Path) -> None:
    alias = root.parent / "alias"
    alias.symlink_to(root)
    put(alias, alias / "one", "x")
    put(alias, root / "two", "x")
    assert sorted(p.name for p in root.iterdir()) == ["one", "two"]


def test_a_folder_swapped_for_a_link_is_never_followed(root: Path) -> None:
    outside, folder, stop = root.parent / "outside", root / "d", threading.Event()

    def swap() -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            with suppress(OSError):
                folder.rename(root / f"d{turn}")
            with suppress(OSError):
                folder.symlink_to(outside)
            with suppress(OSError):
                folder.unlink()

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        for _ in range(2000):
            try:
                open_output(root, folder / "out")
            except (FileRefused, FileNotFoundError):
                continue
    finally:
        stop.set()
        attacker.join()
    assert not list(outside.iterdir())


def test_only_regular_files(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(root)  # the path of a socket is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for name in ("fifo", "folder", "socket"):
            with pytest.raises(FileRefused, match=name):
                open_output(root, root / name)
            with pytest.raises(FileRefused, match=name):
                files.open_for_reading([root], str(root / name))


def test_a_fifo_with_a_reader_is_refused_as_well(root: Path) -> None:
    os.mkfifo(root / "fifo")
    reader = os.open(root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(FileRefused, match="FIFO"):
            open_output(root, root / "fifo")
    finally:
        os.close(reader)


def test_the_null_device_is_allowed_by_its_name_only(root: Path) -> None:
    open_output(root, "/dev/null")
    with pytest.raises(FileRefused):
        open_output(root, "/dev/zero")


def test_a_full_or_missing_disk_is_no_refusal(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.open_for_reading([root], str(root / "missing/out"))
    with pytest.raises(OSError, match="too long"):
        open_output(root, root / ("x" * 300))


def test_no_descriptor_is_lost(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (root / "link").symlink_to("/etc")
    for path in (root / "a/b/c", root / "link/x", root / "link", Path("/etc/passwd")):
        try:
            open_output(root, path)
        except FileRefused:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_make_directory(root: Path) -> None:
    make_folder(root, root / "a/b")
    make_folder(root, root / "a/b")
    make_folder(root, root)
    assert (root / "a/b").is_dir()


def test_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "deep/scripts"
    scripts = files.Scripts(folder)
    path = Path(scripts.write(7, 1, "#!/bin/sh\r\necho é\n"))
    assert path == files.script_path(folder, 7, 1)
    assert path.read_bytes() == "#!/bin/sh\r\necho é\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    target = tmp_path / "target"
    target.write_text("kept")
    path.unlink()
    path.symlink_to(target)
    assert scripts.write(7, 1, "#!/bin/sh\n") == str(path)
    assert target.read_text() == "kept"
    assert not path.is_symlink()
    scripts.remove(7, 1)
    scripts.remove(7, 1)
    assert not list(folder.glob("job-*"))


@pytest.mark.parametrize("pid", [1, 4_194_303])
@pytest.mark.parametrize("why", files.Why)
def test_what_is_noted_on_a_script(tmp_path: Path, pid: int, why: files.Why) -> None:
    path = Path(files.Scripts(tmp_path).write(1, 1, "#!/bin/sh\n"))
    assert files.note_on(path) is None
    files.note_start(str(path), pid)
    assert files.note_on(path) == files.Note(pid)
    files.note_end(path, pid, why)
    assert files.note_on(path) == files.Note(pid, why)
    path.unlink()
    assert files.note_on(path) is None
    files.note_end(path, pid, why)
    assert files.note_on(path) == files.Note(pid, why)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.touch()
    assert files.note_on(path) is None


@pytest.mark.parametrize("seconds", [-1, 0, 2**22, 5 * 2**22, 5 * 2**22 + 7])
def test_what_is_no_note(tmp_path: Path, seconds: int) -> None:
    path = tmp_path / "job-1.1"
    path.touch()
    os.utime(path, (seconds, seconds))
    assert files.note_on(path) is None


def test_a_note_follows_no_link_and_waits_for_no_reader(tmp_path: Path) -> None:
    other, link, fifo = (tmp_path / name for name in ("other", "job-1.1", "job-2.1"))
    other.touch()
    link.symlink_to(other)
    os.mkfifo(fifo)
    before = other.stat().st_mtime
    for path in (link, fifo):
        files.note_end(path, 7, files.Why.STOP)
        assert files.note_on(path) == files.Note(7, files.Why.STOP)
    assert other.stat().st_mtime == before


def test_the_file_of_an_ended_script_is_the_next_ones(tmp_path: Path) -> None:
    scripts = files.Scripts(tmp_path)
    first = Path(scripts.write(7, 1, "#!/bin/sh\necho a longer one\n"))
    inode = first.stat().st_ino
    scripts.remove(7, 1)
    for number, text in enumerate(("#!/bin/sh\n", "#!/bin/sh\necho " + "x" * 10_000), 8):
        path = Path(scripts.write(number, 1, text))
        assert (path.stat().st_ino, path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (inode, text, 0o700)
        scripts.remove(number, 1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("what", ["linked", "opened up", "gone", "a link"])
def test_a_file_that_is_not_ours_alone_any_more_is_no_next_one(tmp_path: Path, what: str) -> None:
    scripts, kept = files.Scripts(tmp_path / "scripts"), tmp_path / "kept"
    script = Path(scripts.write(7, 1, "#!/bin/sh\necho first\n"))
    match what:
        case "linked":
            kept.hardlink_to(script)
        case "opened up":
            script.chmod(0o777)
    scripts.remove(7, 1)
    [spare] = (tmp_path / "scripts").iterdir()
    if what in ("gone", "a link"):
        spare.unlink()
    if what == "a link":
        kept.write_text("#!/bin/sh\necho first\n")
        spare.symlink_to(kept)
    path = Path(scripts.write(8, 1, "#!/bin/sh\n"))
    assert path.read_text() == "#!/bin/sh\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not kept.exists() or kept.read_text() == "#!/bin/sh\necho first\n"


def test_no_more_files_are_kept_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SPARE", 2)
    scripts = files.Scripts(tmp_path)
    for number in range(5):
        scripts.write(number, 1, "#!/bin/sh\n")
    for number in range(5):
        scripts.remove(number, 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_script_folder_that_others_write_in_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(FileRefused, match="other users"):
        files.Scripts(tmp_path).write(7, 1, "#!/bin/sh\n")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("#!/bin/sh", ["/bin/sh", "/s"]),
        ("#!  /bin/sh\t", ["/bin/sh", "/s"]),
        ("#!/bin/sh -e  -u ", ["/bin/sh", "-e  -u", "/s"]),
        ("#! /usr/bin/env bash", ["/usr/bin/env", "bash", "/s"]),
        ("#!/bin/sh\t-x", ["/bin/sh", "-x", "/s"]),
    ],
)
def test_interpreters(line: str, command: list[str]) -> None:
    assert files.command_for("/s", f"{line}\necho\n") == command
    assert files.command_for("/s", line) == command


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo", "begin with"),
        ("#!", "no interpreter"),
        ("#! \t\necho", "no interpreter"),
        ("#!/bin/sh\r\n", "carriage return"),
        ("#!bash\n", "absolute"),
        ("#!/no/such/shell\n", "does not exist"),
        ("#!/etc/passwd\n", "may not be executed"),
        ("#!/bin\n", "does not exist"),
        ("#!/bin/sh " + "x" * 300, "longer than"),
    ],
)
def test_no_interpreter(text: str, why: str) -> None:
    with pytest.raises(LaunchFailed, match=why):
        files.command_for("/s", text)
