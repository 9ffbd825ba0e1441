"""bhysend -A: answers from a pipe, handed to a bhysend that lives, or acted on where none does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bhystream import state
from bhystream.answers import Answer, Box, pack
from bhystream.handshake import GO, HELD, MOVED, PAUSED
from bhystream.rendezvous import Rendezvous, path_of
from bhystream.report import Console
from bhystream.standing import in_doubt
from bhystream.state import Lock, Record, Records
from bhystream.third import Third

ROOT = Path(__file__).resolve().parent.parent
ID, OTHER = "0123456789abcdef" * 2, "f" * 32
NAMES = ("web1", "qemu:/web1")
RECORD = Record(
    ID, *NAMES, "lock-1", PAUSED, {"hypervisor": "none"}, 1, host="hv2/a1", directory="/d"
)
LIMIT_S = 60


def line(word: str, *args: str, id_: str = ID) -> bytes:
    return pack(Answer(id_, word, args))


HELLO = line("HELLO", "hv2/a1", "/d")
READY, RUNNING, RAN, UNKNOWN = (
    line("READY", "00" * 16),
    line("RUNNING"),
    line("RAN"),
    line("UNKNOWN"),
)
FAILED, REFUSED = line("FAILED", "no disk"), line("REFUSED", "too old")

# bhysend with a guest that is found by any record, and says on standard output
# what it is told.
DRIVER = """
import sys
from bhystream import hypervisors, send, third

def sleep(seconds):
    print("waits", flush=True)

class Paused:
    def is_alive(self):
        return sys.argv[1] != "gone"
    def resume(self):
        print("resume", flush=True)
    def discard(self):
        print("discard", flush=True)
    def close(self):
        print("close", flush=True)

hypervisors.open_paused = lambda revive: Paused()
third.time.sleep = sleep
if sys.argv[1] == "impatient":
    third._LOCK_SECONDS = third._DRAIN_SECONDS = 0.0
sys.exit(send.main(["-A", *sys.argv[2:]]))
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a state directory whose name is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setenv("BHYSEND_STATE_DIR", f"{made}/s")
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "lib"))
        yield state.directory()


@pytest.fixture
def records(base: Path) -> Records:
    return Records(base, "source")


def start(*names: str, guest: str = "alive") -> subprocess.Popen[bytes]:
    """Start a third stage; guest: what open_paused() finds, alive or gone; impatient: no waits."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, guest, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[int, list[str], str]:
    """Feed the rest of its input; return its status, the acts, standard error."""
    out, err = process.communicate(data, timeout=LIMIT_S)
    assert b"Traceback" not in err, err
    return process.returncode, out.decode().split(), err.decode()


# With a bhysend.


class Source:
    """The bhysend of the stream."""

    def __init__(self, base: Path) -> None:
        self.box = Box()
        self.noise: list[bytes] = []
        self.rendezvous = Rendezvous(self.box, ID, NAMES, self.noise.append)
        self.rendezvous.listen(base)
        self.rendezvous.start()

    def said_hello(self) -> bool:
        return self.box.wait(lambda: self.box.hello is not None, LIMIT_S)

    def final(self) -> str:
        self.box.wait(lambda: False, LIMIT_S)
        return self.box.final.word if self.box.final else ""


@pytest.fixture
def source(base: Path) -> Iterator[Source]:
    made = Source(base)
    yield made
    made.rendezvous.close(70)


def feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(data)
    process.stdin.flush()


@pytest.mark.parametrize("names", [(), ("web1",), ("qemu:/web1",)])
@pytest.mark.parametrize("status", [0, 76, 81])
def test_it_ends_with_the_status_that_it_is_told(
    source: Source, names: tuple[str, ...], status: int
) -> None:
    third = start(*names)
    feed(third, HELLO + RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(status)
    assert ended(third) == (status, [], "")


def test_every_answer_is_handed_on_and_noise_is_shown(source: Source) -> None:
    third = start()
    feed(third, b"Last login: Mon\n" + HELLO + line("SEEN", "4") + line("ACCEPT") + READY)
    assert source.box.wait(lambda: source.box.nonce is not None, LIMIT_S)
    assert (source.box.seen, source.box.accepted, source.box.nonce) == (4, True, bytes(16))
    assert source.box.hello == Answer(ID, "HELLO", ("hv2/a1", "/d"))
    source.rendezvous.close(0)
    assert ended(third) == (0, [], "bhysend: Last login: Mon\n")
    assert source.noise == []


def test_the_end_of_its_input_is_handed_on_and_the_status_waited_for(source: Source) -> None:
    third = start()
    feed(third, HELLO)
    assert third.stdin
    third.stdin.close()
    assert source.final() == ""
    assert source.box.lost == "the way back was closed"
    source.rendezvous.close(69)
    assert third.wait(LIMIT_S) == 69
    assert third.stdout and third.stderr
    third.stdout.close()
    third.stderr.close()


def test_an_interrupt_is_bhysends_to_decide(source: Source) -> None:
    third = start()
    feed(third, HELLO)
    assert source.said_hello()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP):
        third.send_signal(number)
    feed(third, RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(0)
    assert ended(third) == (0, [], "")


def test_what_still_comes_when_it_was_told_is_read(source: Source) -> None:
    """Else what stands before it in the pipeline would end with a broken pipe."""
    third = start()
    feed(third, HELLO + FAILED)
    assert source.final() == "FAILED"
    source.rendezvous.close(69)
    for _ in range(100):
        feed(third, line("SEEN", "1") * 1000)
    assert ended(third) == (69, [], "")


def test_an_input_that_does_not_end_is_left_when_it_was_told(source: Source) -> None:
    third = start(guest="impatient")
    feed(third, HELLO + RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(0)
    assert third.wait(LIMIT_S) == 0
    assert ended(third) == (0, [], "")


def test_another_guests_stream_is_not_handed_on(source: Source) -> None:
    third = start("web2")
    status, acts, err = ended(third, HELLO + RUNNING)
    assert (status, acts) == (64, [])
    assert f"stream {ID} is of guest web1, not web2" in err
    assert source.final() == ""
    assert source.box.hello is None


def test_garbage_is_not_handed_on_and_the_rest_is_read(source: Source) -> None:
    third = start()
    status, acts, err = ended(third, HELLO + b"garbage\n" + RUNNING + b"x" * (1 << 20))
    assert (status, acts) == (64, [])
    assert err == "bhysend: not an answer\nbhysend: the answers were not handed on\n"
    assert source.final() == ""
    assert source.box.lost


def test_the_answers_of_another_stream_find_no_bhysend(source: Source) -> None:
    status, _, err = ended(start(), line("HELLO", "hv2/a1", "/d", id_=OTHER))
    assert status == 69
    assert f"neither a bhysend nor a guest of stream {OTHER} is here" in err
    assert source.box.hello is None


def test_a_status_that_was_told_is_heard_when_it_hangs_up(base: Path) -> None:
    """bhysend has told it and ended, before the next answer is handed on."""
    third = Third(None, base, Console("bhysend"))
    ours, theirs = socket.socketpair()
    theirs.sendall(b"status 76\n")
    theirs.close()
    third._peer = ours
    third._tell(Answer(ID, "SEEN", ("1",)))
    assert third.status() == 76
    assert third._peer is None


@pytest.mark.parametrize("verdict", [b"", b"status", b"status 8", b"other 8\n"])
def test_what_is_no_status_is_none(base: Path, verdict: bytes) -> None:
    third = Third(None, base, Console("bhysend"))
    third._verdict = verdict
    assert third.status() is None


# With a bhysend that is killed.


class Killed:
    """A bhysend that greets one third stage, reads up to a word, and is gone."""

    def __init__(self, base: Path, word: bytes) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path_of(base, ID))
        self._listener.listen(1)
        self._word = word
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer, self._listener:
            peer.sendall(b'["web1", "qemu:/web1"]\n')
            data = b""
            while self._word not in data:
                data += peer.recv(1 << 16)


@pytest.mark.parametrize(
    ("answers", "status", "says"),
    [
        (HELLO + READY, 69, "bhysend is gone; the guest runs on here"),
        (HELLO + READY + FAILED, 69, "bhysend is gone; the guest runs on here"),
        (HELLO + READY + RUNNING, 0, ""),
    ],
)
def test_without_a_record_a_killed_bhysend_had_settled_it(
    base: Path, answers: bytes, status: int, says: str
) -> None:
    Killed(base, b"READY")
    found, acts, err = ended(start(), answers)
    assert (found, acts) == (status, [])
    assert says in err


@pytest.mark.parametrize(
    ("final", "status", "acts", "left"),
    [
        (RUNNING, 0, ["discard", "close"], []),
        (FAILED, 69, ["resume", "close"], []),
        (b"", 81, [], [GO]),
    ],
)
def test_the_record_of_a_killed_bhysend_is_acted_on(
    base: Path, records: Records, final: bytes, status: int, acts: list[str], left: list[str]
) -> None:
    records.write(RECORD.moved(GO))
    Killed(base, b"READY")
    found, done, _ = ended(start(), HELLO + READY + final)
    assert (found, done) == (status, acts)
    assert [record.phase for record in records.all()] == left


# Without a bhysend, with a record.

ELSEWHERE = line("HELLO", "hv3/b2", "/d")
ELSEWHERE_TOO = line("HELLO", "hv2/a1", "/e")
IN_DOUBT = "in doubt: "
WENT = IN_DOUBT + "the stream went to hv2/a1 (/d)"


@pytest.mark.parametrize(
    ("phase", "answers", "status", "acts", "left", "says"),
    [
        (PAUSED, HELLO, 69, "resume close", None, "hv2: it was not started there"),
        (PAUSED, HELLO + FAILED, 69, "resume close", None, "hv2: no disk"),
        (PAUSED, HELLO + UNKNOWN, 69, "resume close", None, "guest web1: it runs here"),
        (GO, HELLO + RUNNING, 0, "discard close", None, "web1: it runs on hv2, and is gone here"),
        (GO, HELLO + FAILED, 69, "resume close", None, "hv2: no disk"),
        (GO, HELLO + RAN, 81, "", GO, IN_DOUBT + "hv2 cannot say whether it ran there"),
        (GO, HELLO + UNKNOWN, 81, "", GO, IN_DOUBT + "hv2 does not know the stream"),
        (GO, HELLO, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, HELLO + READY, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, HELLO + REFUSED, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, ELSEWHERE + RUNNING, 81, "", GO, WENT + ", not to hv3"),
        (GO, ELSEWHERE + FAILED, 81, "", GO, WENT + ", not to hv3"),
        (GO, ELSEWHERE_TOO + FAILED, 81, "", GO, WENT + ", not to hv2"),
        (MOVED, HELLO + RUNNING, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (MOVED, HELLO, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (MOVED, ELSEWHERE + UNKNOWN, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (HELD, HELLO + FAILED, 81, "", HELD, IN_DOUBT),
        (HELD, HELLO + RUNNING, 81, "", HELD, IN_DOUBT),
    ],
)  # fmt: skip
def test_what_a_record_and_the_answers_come_to(
    records: Records,
    phase: str,
    answers: bytes,
    status: int,
    acts: str,
    left: str | None,
    says: str,
) -> None:
    records.write(RECORD.moved(phase))
    found, done, err = ended(start(), answers)
    assert (found, done) == (status, acts.split())
    assert [record.phase for record in records.all()] == ([left] if left else [])
    assert says in err


def test_a_record_that_names_no_host_takes_the_answer_of_any(records: Records) -> None:
    # It was paused, and GO never recorded: whoever answers, nothing ran.
    records.write(replace(RECORD, host="", directory=""))
    status, acts, err = ended(start(), ELSEWHERE + FAILED)
    assert (status, acts) == (69, ["resume", "close"])
    assert err.startswith("bhysend: hv3: no disk\n")


def test_doubt_comes_with_the_way_out(base: Path, records: Records) -> None:
    records.write(RECORD.moved(GO))
    _, _, err = ended(start(), HELLO)
    assert in_doubt(RECORD, base).splitlines() == [
        line.removeprefix("bhysend: ") for line in err.splitlines()[1:]
    ]


@pytest.mark.parametrize(
    ("phase", "final", "status", "says"),
    [
        (PAUSED, FAILED, 69, "guest web1: its hypervisor is gone; its record is removed"),
        (GO, FAILED, 69, "guest web1: its hypervisor is gone; its record is removed"),
        (GO, RUNNING, 0, "guest web1: it runs on hv2, and is gone here"),
        (MOVED, b"", 0, "guest web1: it runs on hv2, and is gone here"),
    ],
)
def test_a_guest_that_is_gone_is_forgotten(
    records: Records, phase: str, final: bytes, status: int, says: str
) -> None:
    records.write(RECORD.moved(phase))
    found, acts, err = ended(start(guest="gone"), HELLO + final)
    assert (found, acts) == (status, ["close"])
    assert says in err
    assert records.all() == []


@pytest.mark.parametrize("name", ["web1", "qemu:/web1"])
def test_the_guest_may_be_named(records: Records, name: str) -> None:
    records.write(RECORD.moved(GO))
    assert ended(start(name), HELLO + RUNNING)[:2] == (0, ["discard", "close"])


def test_another_guests_record_is_left_alone(records: Records) -> None:
    records.write(RECORD.moved(GO))
    status, acts, err = ended(start("web2"), HELLO + RUNNING)
    assert (status, acts) == (64, [])
    assert f"stream {ID} is of guest web1, not web2" in err
    assert [record.phase for record in records.all()] == [GO]


@pytest.mark.parametrize(
    "after",
    [b"garbage\n", ELSEWHERE, line("RUNNING", id_=OTHER), b"x" * 600, FAILED[:-1] + b" x\n"],
)
def test_answers_with_garbage_change_nothing(records: Records, after: bytes) -> None:
    """Also what came before it: who sends garbage is not believed."""
    record = RECORD.moved(GO)
    records.write(record)
    for answers in (HELLO + RUNNING + after, HELLO + after + FAILED):
        status, acts, err = ended(start(), answers)
        assert (status, acts) == (64, [])
        assert "the answers were not handed on" in err
    assert records.all() == [record]


@pytest.mark.parametrize("answers", [b"", b"ssh: no route to host\n", HELLO[:-1]])
def test_no_answer_changes_nothing(records: Records, answers: bytes) -> None:
    record = RECORD.moved(GO)
    records.write(record)
    status, acts, err = ended(start(), answers)
    assert (status, acts) == (69, [])
    assert "the destination has not answered" in err
    assert records.all() == [record]


# Without either.


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        (HELLO, 69),
        (HELLO + REFUSED, 69),
        (HELLO + FAILED, 69),
        (HELLO + UNKNOWN, 69),
        (HELLO + READY + FAILED, 81),
        (HELLO + READY, 81),
        (HELLO + RUNNING, 81),
        (HELLO + RAN, 81),
    ],
)
def test_answers_to_nobody(base: Path, answers: bytes, status: int) -> None:
    found, acts, err = ended(start(), answers)
    assert (found, acts) == (status, [])
    assert f"neither a bhysend nor a guest of stream {ID} is here" in err
    assert f", {base})" in err
    hint = "is it another user's" if status == 81 else "nothing was started at the destination"
    assert hint in err


# The keeper's lock.


def test_it_waits_for_the_keeper_and_finds_what_that_did(base: Path, records: Records) -> None:
    records.write(RECORD)
    lock = Lock(base, RECORD.lock, "guest web1")
    third = start()
    feed(third, HELLO + READY)
    assert third.stdin and third.stdout
    third.stdin.close()
    assert third.stdout.readline() == b"waits\n"
    records.remove(ID)
    lock.release()
    assert third.wait(LIMIT_S) == 81
    assert set(third.stdout.read().split()) <= {b"waits"}
    third.stdout.close()
    assert third.stderr
    third.stderr.close()


def test_it_acts_on_the_record_as_it_is_under_the_lock(base: Path, records: Records) -> None:
    records.write(RECORD)
    lock = Lock(base, RECORD.lock, "guest web1")
    third = start()
    feed(third, HELLO + RUNNING)
    assert third.stdin and third.stdout and third.stderr
    third.stdin.close()
    assert third.stdout.readline() == b"waits\n"
    records.write(RECORD.moved(GO))
    lock.release()
    assert third.wait(LIMIT_S) == 0
    assert [word for word in third.stdout.read().split() if word != b"waits"] == [
        b"discard",
        b"close",
    ]
    third.stdout.close()
    third.stderr.close()


def test_a_lock_that_is_never_given_up_is_an_error(base: Path, records: Records) -> None:
    records.write(RECORD)
    lock = Lock(base, RECORD.lock, "guest web1")
    status, _, err = ended(start(guest="impatient"), HELLO)
    assert status == 69
    assert "another bhysend or bhyrecv works on it" in err
    assert records.all() == [RECORD]
    lock.release()


def test_the_lock_is_given_up(base: Path, records: Records) -> None:
    records.write(RECORD)
    assert ended(start(), HELLO)[0] == 69
    Lock(base, RECORD.lock, "guest web1").release()


def test_standard_output_is_not_written(base: Path) -> None:
    argv = [sys.executable, str(ROOT / "bhysend"), "-A"]
    done = subprocess.run(
        argv, input=HELLO + RUNNING, capture_output=True, env=os.environ, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout) == (81, b"")
