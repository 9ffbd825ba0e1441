"""What the keeper does when bhysend has been killed, with a hypervisor of the test."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover.state import Records

from .test_keeper import RECORD

RUNS_ON = "guest web1: bhysend is gone; the guest runs on here; it was paused for"
DRIVER = """
import sys
import syslog
from bhystream import hypervisors
from bhystream.send import keeper
from bhystream.errors import GuestError
from support.paused import Paused

syslog.syslog = lambda level, text: print("log", text, flush=True)
keeper._RETRY_SECONDS = 0.001
keeper._RESUME_SECONDS = float(sys.argv[2])
faults = eval(sys.argv[3])

def say(word):
    print(word, flush=True)

class Guest(Paused):
    alive = sys.argv[4] == "alive"
    def do(self, act, there=""):
        say(f"{act} {there}".rstrip())
        if act == "resume" and faults:
            raise faults.pop(0)

def open_paused(revive):
    say("open")
    return Guest()

if sys.argv[4] != "none":
    hypervisors.open_paused = open_paused
sys.exit(keeper.main(sys.argv))
"""


class Driven:
    """A keeper in a process of its own, as Keeper starts it."""

    def __init__(
        self,
        base: Path,
        seconds: float,
        faults: str = "[]",
        *,
        guest: str = "alive",
        answers: int = -1,
    ) -> None:
        self.socket, theirs = socket.socketpair()
        argv = [sys.executable, "-c", DRIVER, str(theirs.fileno()), str(seconds), faults, guest]
        with theirs:
            self.process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(theirs.fileno(),) if answers < 0 else (theirs.fileno(), answers),
            )
        order = {"base": str(base), "record": RECORD._asdict(), "answers": answers}
        self.socket.sendall(json.dumps(order).encode() + b"\n")
        self.socket.settimeout(60)
        assert self.socket.recv(100) == b"ready\n"

    def orphaned(self) -> tuple[int, str, str]:
        """Close bhysend's socket, as the kernel does; return the keeper's status and output."""
        self.socket.close()
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_a_paused_guest_is_resumed_and_its_record_removed(base: Path, records: Records) -> None:
    driven = Driven(base, 60)
    records.write(RECORD._replace(time_ns=time.time_ns() - 3600 * 10**9))
    status, out, err = driven.orphaned()
    *acts, said = out.splitlines()
    assert acts == ["open", "resume"]
    # The length of the pause is counted from the time in the record.
    assert re.fullmatch(f"log {RUNS_ON} 6[0-9] m [0-9]{{2}} s", said)
    assert status == 0
    assert re.fullmatch(f"bhysend: {RUNS_ON} 6[0-9] m [0-9]{{2}} s\n", err)
    assert records.all() == []


def test_it_tries_again_until_the_hypervisor_answers(base: Path, records: Records) -> None:
    driven = Driven(base, 60, "[GuestError('busy'), GuestError('busy')]")
    records.write(RECORD)
    status, out, err = driven.orphaned()
    assert out.splitlines()[:-1] == ["open"] + ["resume"] * 3
    assert status == 0
    assert err.startswith(f"bhysend: {RUNS_ON} ")
    assert records.all() == []


def test_it_tries_again_whatever_failed(base: Path, records: Records) -> None:
    # Only the keeper can resume the guest now, so no fault of ours may stop the keeper.
    driven = Driven(base, 60, "[OSError(11, 'odd'), ValueError('odd')]")
    records.write(RECORD)
    status, out, err = driven.orphaned()
    assert "resume" in out.split(), err
    assert status == 0


def test_what_cannot_be_resumed_is_said_and_its_record_kept(base: Path, records: Records) -> None:
    driven = Driven(base, 0, guest="none")
    records.write(RECORD)
    status, out, err = driven.orphaned()
    why = "guest web1: cannot connect to /nonexistent/web1.qmp: No such file or directory"
    said = f"guest web1: it stands paused here, and cannot be resumed: {why}"
    assert err == f"bhysend: {said}\nbhysend: let it run on: bhysend --resume {RECORD.id}\n"
    assert (status, out) == (69, f"log {said}\n")
    assert records.all() == [RECORD]


def test_a_guest_that_stays_paused_is_its_hypervisors_and_the_operators(
    base: Path, records: Records
) -> None:
    """When the keeper gives up, the guest stands paused in its hypervisor, and has its record."""
    driven = Driven(base, 0, "[GuestError('busy')] * 3")
    records.write(RECORD)
    found, out, err = driven.orphaned()
    assert (found, out.split().count("resume")) == (69, 1)
    assert "guest web1: it stands paused here, and cannot be resumed: busy\n" in err
    assert f"let it run on: bhysend --resume {RECORD.id}\n" in err
    assert [record.phase for record in records.all()] == [PAUSED]


def test_a_record_that_can_be_read_in_time_is_acted_on(base: Path, records: Records) -> None:
    driven = Driven(base, 60)
    path = base / "source" / f"{RECORD.id}.json"
    path.write_text("{")
    driven.socket.close()
    records.write(RECORD)
    out, _ = driven.process.communicate(timeout=60)
    assert driven.process.returncode == 0
    assert "resume" in out.split()


def test_a_record_that_stays_broken_resumes_nothing(base: Path, records: Records) -> None:
    driven = Driven(base, 0)
    (base / "source" / f"{RECORD.id}.json").write_text("{")
    status, out, err = driven.orphaned()
    assert status != 0
    assert out.split()[0] == "open"
    assert "resume" not in out.split()
    assert "it may stand paused here; see bhysend -l" in err and "Traceback" not in err


def test_the_record_of_a_guest_that_is_gone_is_removed(base: Path, records: Records) -> None:
    driven = Driven(base, 60, guest="gone")
    records.write(RECORD)
    status, out, err = driven.orphaned()
    said = "log guest web1: its hypervisor is gone"
    assert (status, out.splitlines()) == (0, ["open", "clear", said])
    assert err == "bhysend: guest web1: its hypervisor is gone\n"
    assert records.all() == []


@pytest.mark.parametrize("phase", [None, HELD, GO])
def test_nothing_else_is_ever_resumed(base: Path, records: Records, phase: str | None) -> None:
    driven = Driven(base, 60)
    if phase:
        records.write(RECORD)
        records.write(RECORD.with_phase(phase))
    status, out, err = driven.orphaned()
    told = {None: "", HELD: "the guest is held", GO: "the guest is in doubt, paused here"}[phase]
    said = f"guest web1: bhysend is gone; {told}"
    act = [f"log {said}"] if phase else ["clear"]
    assert (status, out.splitlines()) == (0, ["open", *act])
    assert err == (f"bhysend: {said}\n" if phase else "")
    assert [record.phase for record in records.all()] == ([phase] if phase else [])


def test_a_guest_that_has_moved_is_ended_here(base: Path, records: Records) -> None:
    driven = Driven(base, 60)
    records.write(RECORD.with_phase(MOVED)._replace(host="hv2/ff", directory="/d"))
    status, out, err = driven.orphaned()
    assert out.splitlines()[:-1] == ["open", "open", "discard hv2", "close"]
    assert status == 0
    assert err == (
        "bhysend: guest web1: bhysend is gone; the guest runs on hv2, and is gone here\n"
    )
    assert records.all() == []


@pytest.mark.parametrize(
    ("answer", "acts", "left"),
    [
        (b"RUNNING", ["open", "open", "discard hv2", "close"], []),
        (b"FAILED no", ["open", "resume"], []),
        (b"RAN", ["open"], [GO]),
        (b"", ["open"], [GO]),
    ],
)
def test_a_commands_answers_are_read_on(
    base: Path, records: Records, answer: bytes, acts: list[str], left: list[str]
) -> None:
    """A line that bhysend has read in part, and another stream's answers, are skipped."""
    theirs, ours = os.pipe()
    driven = Driven(base, 60, answers=theirs)
    os.close(theirs)
    records.write(RECORD.with_phase(GO)._replace(host="hv2/ff", directory="/d"))
    other = b"0" * 32
    os.write(ours, b"93c SEEN 7\nbhys1 " + other + b" RUNNING\nbhys1 " + other + b" FAILED x\n")
    if answer:
        os.write(ours, b"bhys1 " + RECORD.id.encode() + b" " + answer + b"\n")
    os.close(ours)
    status, out, err = driven.orphaned()
    assert (status, out.splitlines()[:-1]) == (0, acts)
    assert [record.phase for record in records.all()] == left
    assert ("  ssh hv2 env BHYSEND_STATE_DIR=/d bhyrecv -q " in err) == bool(left)


def test_a_word_cut_short_is_no_dismissal(base: Path, records: Records) -> None:
    driven = Driven(base, 60)
    records.write(RECORD)
    driven.socket.sendall(b"don")
    status, out, _ = driven.orphaned()
    assert (status, "resume" in out.splitlines()) == (0, True)
