"""The demonstration: run for real, as a newcomer runs it, and with faults planted in it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream import demo, inherited

DEADLINE_S = 60
RUN = [sys.executable, "-m", "bhystream.demo"]
COLUMNS = 80
IS_ROOT = sys.platform == "linux" and os.geteuid() == 0

# Faults that are planted before main() runs; each spoils one part of the stage.
DISK_MISSING = """
from bhystream.standin.stage import PlayedHost
from bhystream import demo
whole = demo.Stage.start_guest
def spoil(self, *a):
    self.there.disk.unlink()
    whole(self, *a)
demo.Stage.start_guest = spoil
"""
PAGE_SPOILT = """
from bhystream import demo
whole = demo.Demo._move
def spoil(self, config):
    moved = whole(self, config)
    with (self._stage.there.directory / "vmm" / "web1").open("r+b") as node:
        node.seek(257 * 4096)  # one that is never written again
        node.write(b"not what the guest wrote")
    return moved
demo.Demo._move = spoil
"""
GUEST_DIES = """
from bhystream import demo
whole = demo.Demo._move
def spoil(self, config):
    moved = whole(self, config)
    (self._stage.there.directory / "vmm" / "web1").unlink()
    demo._WAIT_S = 1.0
    return moved
demo.Demo._move = spoil
"""


def left_in(directory: Path) -> list[str]:
    """Return the names that a demonstration has left in its own directory."""
    return sorted(path.name for path in directory.iterdir())


def processes_of(directory: str) -> list[str]:
    """Return the command lines of the processes that name a directory, also in an environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if directory.encode() in words and int(path.name) != os.getpid():
                found.append(words[:200].replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the one directory that the demonstration may use; assert that it is empty at the end."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="d", dir=base))
    path.chmod(0o1777)
    try:
        yield path
        assert left_in(path) == []
        assert processes_of(str(path)) == []
    finally:
        shutil.rmtree(path, ignore_errors=True)


def in_directory(own: Path, planted: str = "") -> list[str]:
    """Return the words that run the demonstration in a directory, with a fault planted."""
    code = f"""
import sys
from pathlib import Path
from bhystream.standin import stage
stage._BASES = ({str(own)!r},)
{planted}
from bhystream import demo
sys.exit(demo.main())
"""
    return [sys.executable, "-P", "-c", code]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and capture its output."""
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that the guest proved itself, and that the report has bhysend's own numbers."""
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(
        r"; (\d+) rounds, (.+?); paused (.+?) \(state (.+?),.*\), predicted (\S+ m?s) ", done.stderr
    )
    assert said, done.stderr
    rounds, sent, paused, state, predicted = said.groups()
    assert f"{sent} in {rounds} rounds" in done.stdout
    assert f"{paused}, predicted {predicted};" in done.stdout
    assert f"in {state}" in done.stdout
    assert re.search(r"beats 1 to \d+, none missing; checked 2 times there", done.stdout)
    assert re.search(r"^passed in [0-9.]+ m?s; nothing is left behind$", done.stdout, re.M)


def assert_written(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that the report admits that the memory was written in the pause."""
    assert "a file, no null device: " in done.stdout
    assert "bhyve writes the memory into" in done.stderr


@contextlib.contextmanager
def on_terminal(words: list[str]) -> Iterator[tuple[int, int]]:
    """Run a program on a terminal of its own; yield its pid and the other end."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp(words[0], words)
    termios.tcsetwinsize(fd, (50, COLUMNS))
    try:
        yield pid, fd
    finally:
        os.close(fd)


def read_until(fd: int, text: str) -> str:
    """Read from a terminal until a text has come; return all that was read."""
    said, end = "", time.monotonic() + DEADLINE_S
    while text not in said:
        assert select.select([fd], [], [], max(0.0, end - time.monotonic()))[0], said
        said += os.read(fd, 4096).decode(errors="replace")
    return said


def test_the_guest_moves_and_proves_itself_and_nothing_is_left(own: Path) -> None:
    assert_passed(run(in_directory(own)))


@pytest.mark.skipif(not IS_ROOT, reason="only root can become somebody else; test one does it all")
def test_it_needs_no_root(own: Path) -> None:
    """The user is nobody; bhyve then writes the memory, and the report says what that costs."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/"]
    if run([*nobody, sys.executable, "-c", "import bhystream"]).returncode != 0:
        pytest.skip("nobody may not run this Python, in root's directory")
    done = run([*nobody, *in_directory(own)])
    assert_passed(done)
    assert_written(done)


@pytest.mark.skipif(sys.platform != "linux", reason="unshare(1) is Linux's")
def test_without_the_right_to_mount_the_report_says_what_it_costs(own: Path) -> None:
    done = run(["unshare", "-U", *in_directory(own)])
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert_passed(done)
    assert_written(done)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (DISK_MISSING, "bhysend ended with status 76: the guest had to run on"),
        (PAGE_SPOILT, "the guest found a fault: WRONG page 257: expected"),
        (GUEST_DIES, "the guest does not go on in 1 s"),
    ],
    ids=["disk missing", "page spoilt", "guest dies"],
)
def test_a_fault_ends_it_with_another_status_and_leaves_nothing(
    own: Path, planted: str, said: str
) -> None:
    done = run(in_directory(own, planted))
    assert done.returncode == 69, done.stdout + done.stderr
    assert f"demo: FAILED: {said}" in done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle_of_the_move_it_leaves_nothing(
    own: Path, number: signal.Signals
) -> None:
    demo = subprocess.Popen(in_directory(own), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert demo.stderr is not None
    for line in demo.stderr:
        if b"round 0" in line:
            break
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 128 + number
    assert f"demo: interrupted by {number.name}" in errors.decode()


def test_ctrl_c_reaches_bhysend_too_and_leaves_nothing(own: Path) -> None:
    with on_terminal(in_directory(own)) as (pid, fd):
        read_until(fd, "round 0:")
        os.write(fd, b"\x03")
        said = read_until(fd, "demo: interrupted by SIGINT")
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
    assert "Traceback" not in said


def test_on_a_terminal_nothing_is_wider_and_the_progress_is_redrawn() -> None:
    with on_terminal(RUN) as (pid, fd):
        said = read_until(fd, "nothing is left behind")
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    drawn = re.findall(r"\r(bhysend: guest web1: round 0: [^\r\n]*\[[#.]+\])", said)
    assert drawn
    assert max(len(line) for line in drawn) < COLUMNS
    assert not re.search(r"\].*bhyrecv\(", said.replace("\r\n", "\n").replace("\r", "\n"))
    own = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.split("\r\n")]
    wide = [
        line for line in own if len(line) > COLUMNS and not re.match(r"\r| *\r|bhy|guest", line)
    ]
    assert wide == []


def test_a_machine_without_room_is_told_so(own: Path) -> None:
    done = run(in_directory(own, "from bhystream import demo; demo._NEEDED_BYTES = 1 << 60"))
    assert done.returncode == 69
    assert "MiB are needed" in done.stderr


def test_a_program_may_be_in_sbin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = (tmp_path / "bin", tmp_path / "sbin")
    monkeypatch.setattr(demo, "_BINS", places)
    for directory in places[::-1]:  # a program in bin comes first
        directory.mkdir()
        (directory / "bhyrecv").touch(0o755)
        assert demo.program("bhyrecv") == [str(directory / "bhyrecv")]


def test_the_programs_can_be_run_as_modules(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is used if no bhysend is installed beside Python, as in a checkout on PYTHONPATH."""
    words = inherited.program("recv")
    monkeypatch.setattr(demo, "_BINS", (tmp_path,))
    assert demo.program("bhyrecv") == words
    assert run([*words, "-q"]).returncode == 64
    planted = "from bhystream import demo; demo._BINS = ()"
    assert_passed(run(in_directory(own, planted)))
