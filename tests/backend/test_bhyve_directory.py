"""Snapshot files through the two programs: bhysend FILE, and bhyrecv -S, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess

import pytest

from bhystream.handover import answers
from support import streams
from support.waiting import until

from .snapshot_files import MEMORY, made, names, text_of

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = ("", ".kern", ".meta")
SECONDS = 30.0


class Host:
    """A stand-in's host with a snapshot, whose streams are received without the stand-in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.there = directory / "there"
        for name in ("host", "here", "there"):
            (directory / name).mkdir()
        self.snapshot = directory / "here" / "web1"
        meta, kern = made()
        self.snapshot.with_name("web1.meta").write_bytes(text_of(meta))
        self.snapshot.with_name("web1.kern").write_bytes(kern)
        with self.snapshot.open("wb") as file:
            file.truncate(MEMORY)
            for offset in (0, MEMORY // 2, MEMORY - 4096):
                file.seek(offset)
                file.write(os.urandom(4096))

    def command(self, program: str, *options: str) -> tuple[list[str], dict[str, str]]:
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= {"PYTHONPATH": str(ROOT / "lib"), "BHYSEND_STATE_DIR": str(self.state)}
        if program == "bhysend":
            environment["BHYSEND_VMM_DIR"] = str(self.directory / "host")
        return [sys.executable, str(ROOT / program), *options], environment

    def run(
        self, program: str, *options: str, stream: bytes | None = None
    ) -> CompletedProcess[bytes]:
        command, environment = self.command(program, *options)
        return subprocess.run(
            command, env=environment, input=stream or b"", capture_output=True, timeout=SECONDS
        )

    def receive(
        self, stream: bytes, *options: str, directory: str | None = None
    ) -> CompletedProcess[bytes]:
        """Run bhyrecv -S."""
        where = directory or str(self.there)
        return self.run("bhyrecv", "-S", where, *options, stream=stream)

    def stream(self) -> bytes:
        """Return the stream of the snapshot."""
        done = self.run("bhysend", str(self.snapshot))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def assert_same(self, name: str = "web1") -> None:
        for suffix in SUFFIXES:
            one = self.snapshot.with_name(f"web1{suffix}").read_bytes()
            assert (self.there / f"{name}{suffix}").read_bytes() == one, suffix

    def assert_nothing_made(self) -> None:
        assert names(self.there) == []
        if self.state.exists():
            assert names(self.state / "destination") == []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_files_arrive_as_they_are(host: Host) -> None:
    done = host.receive(host.stream())
    assert done.returncode == 0, done.stderr
    assert f"its snapshot files are made: {host.there}/web1".encode() in done.stderr
    assert names(host.there) == ["web1", "web1.kern", "web1.meta"]
    host.assert_same()
    assert (host.there / "web1").stat().st_blocks * 512 < MEMORY


def test_a_stream_may_become_files_again_and_under_another_name(host: Host) -> None:
    """bhyrecv -S starts no guest, so it records nothing."""
    stream = host.stream()
    for name in ("one", "two"):
        assert host.receive(stream, name).returncode == 0
        host.assert_same(name)
    assert names(host.state / "destination") == []


def test_files_that_exist_are_left_alone(host: Host) -> None:
    stream = host.stream()
    (host.there / "web1.kern").write_text("mine")
    done = host.receive(stream)
    assert done.returncode == 76
    assert f"-S: {host.there}/web1.kern exists".encode() in done.stderr
    assert names(host.there) == ["web1.kern"]
    assert (host.there / "web1.kern").read_text() == "mine"


def test_a_dry_run_says_whether_the_files_could_be_made(host: Host) -> None:
    stream = host.stream()
    assert host.receive(stream, "-n").returncode == 0
    done = host.receive(stream, "-n", directory=f"{host.there}/none")
    assert done.returncode == 76
    assert b"none is not a directory that can be written to" in done.stderr
    host.assert_nothing_made()


def test_a_directory_that_is_not_there_is_76(host: Host) -> None:
    done = host.receive(host.stream(), directory=f"{host.there}/none")
    assert done.returncode == 76
    assert b"nothing was started here" in done.stderr
    host.assert_nothing_made()


def test_a_stream_without_its_end_leaves_nothing(host: Host) -> None:
    stream = host.stream()
    done = host.receive(stream[:-8])
    assert done.returncode == 65, done.stderr
    host.assert_nothing_made()


def test_a_changed_byte_leaves_nothing(host: Host) -> None:
    stream = bytearray(host.stream())
    stream[-200] ^= 1
    assert host.receive(bytes(stream)).returncode == 65
    host.assert_nothing_made()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(host: Host, number: signal.Signals) -> None:
    stream = host.stream()
    command, environment = host.command("bhyrecv", "-S", str(host.there))
    child = subprocess.Popen(command, env=environment, stdin=PIPE, stderr=PIPE)
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write(stream[:-64])
    child.stdin.flush()
    until(lambda: names(host.there) or child.poll() is not None, "a file", SECONDS)
    assert names(host.there)
    child.send_signal(number)
    said = child.stderr.read()
    assert child.wait(SECONDS) == 75, said
    child.stdin.close()
    host.assert_nothing_made()


@pytest.mark.parametrize("options", [("-u",), ("-S", "there")], ids=["-u", "-S"])
@pytest.mark.parametrize("is_dry", [False, True], ids=["a move", "a dry run"])
def test_a_stream_that_waits_for_answers_is_refused(
    host: Host, options: tuple[str, ...], is_dry: bool
) -> None:
    """With -u or -S the operator starts the guest later, so bhyrecv cannot answer GO."""
    stream = streams.header(streams.ANSWERED, mandatory=streams.NO_MEMORY if is_dry else 0)
    words = [str(host.there) if word == "there" else word for word in options]
    done = host.run("bhyrecv", *(["-n"] if is_dry else []), *words, stream=stream)
    assert done.returncode == 76, done.stderr
    why = f"{options[0]}: the answered form always starts the guest"
    assert why.encode() in done.stderr
    said = [answers.unpack(line).word for line in done.stdout.splitlines(keepends=True)]
    assert said == ["HELLO", "REFUSED"]
    host.assert_nothing_made()


def test_a_guest_of_qemu_has_no_snapshot_files(host: Host) -> None:
    done = host.receive((ROOT / "tests/data/kept.bhys").read_bytes())
    assert done.returncode == 64
    assert b"-S and -x are for guests of bhyve; this one runs under QEMU" in done.stderr
    host.assert_nothing_made()


def test_a_snapshot_that_is_not_there_is_69_and_no_byte_is_sent(host: Host) -> None:
    done = host.run("bhysend", f"{host.directory}/none")
    assert (done.returncode, done.stdout) == (69, b"")
    assert b"none" in done.stderr


@pytest.mark.parametrize(
    "options", [("-a",), ("-p", "true")], ids=["answers", "a command at the pause"]
)
def test_a_snapshot_has_no_pause_and_nobody_to_answer(host: Host, options: tuple[str, ...]) -> None:
    done = host.run("bhysend", *options, str(host.snapshot))
    assert (done.returncode, done.stdout) == (64, b"")
    done = host.run("bhysend", str(host.snapshot), "true")
    assert (done.returncode, done.stdout) == (64, b"")
