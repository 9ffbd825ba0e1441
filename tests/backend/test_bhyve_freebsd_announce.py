"""The announcement on FreeBSD: its frame, the calls of bpf(4), which are played, and its times."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import freebsd_announce
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.process import Identity, identify
from bhystream.errors import GuestError

CARDS = {"tap0": "58:9c:fc:00:00:01", "vmnet1": "58:9c:fc:00:00:02"}
PROCESS = Identity(4711, 1234, "boot")
NOW = 1000.0


def test_the_ioctls_of_bpf_have_the_kernels_numbers() -> None:
    assert freebsd_announce.BIOCSETIF == 0x8020426C
    assert freebsd_announce.BIOCSHDRCMPLT == 0x80044275
    assert freebsd_announce.BIOCFEEDBACK == 0x8004427C


def test_the_frame_is_a_rarp_request_of_the_card() -> None:
    header = "ffffffffffff589cfc0000018035"
    packet = "0001080006040003589cfc00000100000000589cfc00000100000000"
    frame = freebsd_announce.rarp("58:9c:fc:00:00:01")
    assert frame[:42].hex() == header + packet
    assert frame[42:] == bytes(18)


class Bpf:
    """bpf(4), as far as an announcement needs it.  broken: interfaces that cannot be used."""

    def __init__(self, path: Path, broken: Mapping[str, int]) -> None:
        self._path, self._broken = path, broken
        self.sent: list[tuple[str, bytes]] = []
        self._calls: list[tuple[int, bytes]] = []

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert os.path.samestat(os.fstat(fd), os.stat(self._path))
        self._calls.append((request, argument))
        return 0

    def write(self, fd: int, frame: bytes) -> int:
        (first, name), *others = self._calls
        self._calls = []
        assert (first, len(name)) == (freebsd_announce.BIOCSETIF, 32)
        one = b"\1\0\0\0"
        switches = (freebsd_announce.BIOCSHDRCMPLT, freebsd_announce.BIOCFEEDBACK)
        assert others == [(switch, one) for switch in switches]
        interface = name.rstrip(b"\0").decode()
        if interface in self._broken:
            raise OSError(self._broken[interface], os.strerror(self._broken[interface]))
        self.sent.append((interface, frame))
        return len(frame)


def bpf(monkeypatch: pytest.MonkeyPatch, path: Path, **broken: int) -> Bpf:
    """Play bpf(4) with a file in the place of its device."""
    path.touch()
    made = Bpf(path, broken)
    monkeypatch.setattr(freebsd_announce, "_BPF", str(path))
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    monkeypatch.setattr(os, "write", made.write)
    return made


def frames(cards: Mapping[str, str]) -> list[tuple[str, bytes]]:
    return [(interface, freebsd_announce.rarp(mac)) for interface, mac in cards.items()]


def test_each_card_is_announced_on_its_interface(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played = bpf(monkeypatch, tmp_path / "bpf")
    before = os.listdir("/proc/self/fd")
    assert freebsd_announce.send(CARDS) == []
    assert played.sent == frames(CARDS)
    assert os.listdir("/proc/self/fd") == before


def test_one_interface_that_fails_keeps_no_other_from_being_announced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played = bpf(monkeypatch, tmp_path / "bpf", tap0=errno.ENETDOWN)
    assert freebsd_announce.send(CARDS) == ["tap0: Network is down"]
    assert played.sent == frames({"vmnet1": CARDS["vmnet1"]})


class Child:
    """A process that was started."""

    returncode: int | None = None

    def __init__(self, argv: list[str], **options: Any) -> None:
        self.argv, self.options = argv, options


@pytest.fixture
def host() -> FreeBsdHost:
    return FreeBsdHost.__new__(FreeBsdHost)


def test_the_later_announcements_are_left_to_a_process_that_has_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, host: FreeBsdHost
) -> None:
    """A stream of ours that the process had would keep ssh(1) from its end."""
    started: list[Child] = []
    sent: list[Mapping[str, str]] = []

    def popen(argv: list[str], **options: Any) -> Child:
        assert sent == [CARDS]  # the first announcement waits for nothing
        started.append(Child(argv, **options))
        return started[0]

    def send(cards: Mapping[str, str]) -> list[str]:
        sent.append(cards)
        return []

    monkeypatch.setattr(freebsd_announce, "send", send)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(time, "monotonic", lambda: NOW)
    host.announce(CARDS, PROCESS)
    [child] = started
    assert child.options == {
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
        "start_new_session": True,
    }
    assert child.argv[-2] == freebsd_announce.__name__
    assert json.loads(child.argv[-1]) == {"cards": CARDS, "process": [*PROCESS], "since": NOW}


def test_what_fails_is_told_and_the_rest_is_done(
    monkeypatch: pytest.MonkeyPatch, host: FreeBsdHost
) -> None:
    started: list[Child] = []

    def popen(argv: list[str], **options: Any) -> Child:
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(Child(argv, **options))
        return started[0]

    monkeypatch.setattr(freebsd_announce, "send", lambda cards: ["tap0: Network is down"])
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(GuestError, match=r"^tap0: Network is down$"):
        host.announce(CARDS, PROCESS)
    assert len(started) == 1
    with pytest.raises(GuestError, match=r"down; only once: cannot run .*: Resource temporarily"):
        host.announce(CARDS, PROCESS)


def test_no_interface_has_a_path_for_a_name(host: FreeBsdHost) -> None:
    with pytest.raises(GuestError, match="no name of an interface"):
        host.announce({"../tap0": CARDS["tap0"]}, PROCESS)


class Waits:
    """await_end() that takes its whole limit; the process ends in one of the waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends_in: int = 9) -> None:
        self.now, self._ends_in = NOW + 0.25, ends_in
        self.limits: list[float] = []
        self.sent: list[tuple[float, Mapping[str, str]]] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(freebsd_announce, "await_end", self._await_end)
        monkeypatch.setattr(freebsd_announce, "send", self._send)

    def _await_end(self, who: Identity, limit_s: float) -> bool:
        assert who == PROCESS
        self.limits.append(limit_s)
        self.now += limit_s
        return len(self.limits) == self._ends_in

    def _send(self, cards: Mapping[str, str]) -> list[str]:
        self.sent.append((self.now - NOW, cards))
        return ["tap0: Network is down"]


def order(since: float = NOW) -> list[str]:
    text = json.dumps({"cards": CARDS, "process": PROCESS, "since": since})
    return ["python", text]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Waits:
    monkeypatch.chdir(tmp_path)  # main() changes the directory
    return Waits(monkeypatch)


def test_it_is_announced_again_after_1_2_and_5_seconds(waits: Waits) -> None:
    assert freebsd_announce.main(order()) == 0
    assert waits.sent == [(1.0, CARDS), (2.0, CARDS), (5.0, CARDS)]
    assert waits.limits == [0.75, 1.0, 3.0]
    assert os.getcwd() == "/"


def test_an_announcement_that_is_late_waits_for_nothing(waits: Waits) -> None:
    waits.now = NOW + 2.5
    assert freebsd_announce.main(order()) == 0
    assert waits.limits == [0.0, 0.0, 2.5]
    assert len(waits.sent) == 3


def test_a_guest_that_has_moved_on_is_not_announced_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    waits = Waits(monkeypatch, ends_in=2)
    assert freebsd_announce.main(order()) == 0
    assert [at for at, _ in waits.sent] == [1.0]


def test_the_process_of_the_later_announcements_ends_with_the_guest() -> None:
    """The process is the real one; no interface is touched, because the guest has ended."""
    with subprocess.Popen(["sleep", "60"]) as guest:
        who = identify(guest.pid, "bhyve")
        guest.kill()
    text = json.dumps({"cards": CARDS, "process": who, "since": 0.0})
    words = [sys.executable, "-m", freebsd_announce.__name__, text]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
