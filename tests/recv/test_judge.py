"""bhyrecv -n on a host that has no hypervisor: it verifies a stream, and says if it is sound.

The tests run real processes.  Those on a host that can take the guest are in tests/cli.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess

import pytest

from backend.bhyve_stream import META, head, states_of, whole
from backend.snapshot_files import text_of
from backend.test_bhyve_contents import STATES, Change, grown
from backend.test_qemu_hostile import GOOD
from bhystream.guest import State
from support.streams import (
    ABORT,
    ANSWERED,
    GO,
    KEPT,
    NO_GPA,
    NO_MEMORY,
    NONCE,
    PAD,
    PLAIN,
    Maker,
    abort,
)

ROOT = Path(__file__).parents[2]
SOUND = "guest web1: the stream is sound ("
NO_BHYVE = "): guest web1: it runs under bhyve; "
QEMU = b"QEVM\0\0\0\3"


def receive(directory: Path, stream: bytes, *options: str) -> CompletedProcess[bytes]:
    """Run bhyrecv in an environment that has no hypervisor."""
    environment = {"PATH": "/nonexistent", "BHYSEND_STATE_DIR": str(directory / "state")}
    environment["PYTHONPATH"] = str(ROOT / "lib")
    command = [sys.executable, str(ROOT / "bhyrecv"), *options]
    return subprocess.run(command, env=environment, input=stream, capture_output=True, timeout=60)


def said(done: CompletedProcess[bytes]) -> str:
    return done.stderr.decode()


def words(done: CompletedProcess[bytes]) -> list[str]:
    """Return the words of the answers."""
    return [line.split(b" ")[2].decode() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("form", [PLAIN, KEPT])
@pytest.mark.parametrize("plan", [None, text_of(META)])
def test_a_stream_of_a_hypervisor_that_is_not_here_is_verified(
    tmp_path: Path, form: int, plan: bytes | None
) -> None:
    done = receive(tmp_path, whole(form=form, plan=plan).raw, "-n")
    assert done.returncode == 76, said(done)
    assert SOUND in said(done) and NO_BHYVE in said(done)
    assert "this host can take" not in said(done)


def test_a_stream_of_a_hypervisor_that_nobody_knows_is_not_called_sound(tmp_path: Path) -> None:
    raw = whole([], hypervisor="xen").raw
    done = receive(tmp_path, raw, "-n")
    assert done.returncode == 76, said(done)
    assert "is whole; what it says of the guest is not checked" in said(done)
    assert "the guest's hypervisor 'xen' is not known here" in said(done)
    assert "sound" not in said(done)
    assert receive(tmp_path, raw[:-1], "-n").returncode == 65


@pytest.mark.parametrize("change", [one[1] for one in STATES], ids=[one[0] for one in STATES])
def test_what_makes_no_guest_is_not_called_sound(tmp_path: Path, change: Change) -> None:
    """On any host, -n refuses what a start refuses, in the same words."""
    raw = whole(change(states_of())).raw
    done = receive(tmp_path, raw, "-n")
    assert done.returncode == 65, said(done)
    assert re.search(r": section \d+ \(\w+\) at offset 0x[0-9a-f]+: (state|meta)", said(done))
    assert "sound" not in said(done)
    (tmp_path / "there").mkdir()
    made = receive(tmp_path, raw, "-S", str(tmp_path / "there"))
    assert made.returncode == 65
    assert made.stderr.splitlines()[0] == done.stderr.splitlines()[0]
    assert os.listdir(tmp_path / "there") == []


def test_a_rehearsal_is_compared_with_the_state(tmp_path: Path) -> None:
    done = receive(tmp_path, whole(grown(), plan=text_of(META)).raw, "-n")
    assert done.returncode == 65 and "the rehearsal had" in said(done), said(done)


def test_a_configuration_on_no_list_is_not_called_sound_and_hides_no_fault(
    tmp_path: Path,
) -> None:
    raw = whole(config={"name": "web1", "keys": {"monitor": "true"}, "resources": {}}).raw
    done = receive(tmp_path, raw, "-n")
    assert done.returncode == 76, said(done)
    assert re.search(r"section 2 \(CONFIG\) at offset 0x[0-9a-f]+: .*key monitor", said(done))
    assert "sound" not in said(done)
    assert receive(tmp_path, raw[:-1], "-n").returncode == 65


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "state qemu is missing"),
        ([State("qemu", b"")], "state qemu: it is not a migration stream"),
        ([State("qemu", b"QEVM\0\0\0\2")], "state qemu: it is not a migration stream"),
        ([State("qemu", QEMU + bytes(64 << 20))], "state qemu: more than 64 MiB"),
        ([State("x", QEMU)], "state 'x': QEMU has one, 'qemu'"),
        ([State("qemu", QEMU), State("x", b"")], "state 'x': QEMU has one"),
    ],
)
def test_a_qemu_guest_has_one_state(tmp_path: Path, states: Sequence[State], message: str) -> None:
    done = receive(tmp_path, of_qemu(states).raw, "-n")
    assert done.returncode == 65, said(done)
    assert f": {message}" in said(done) and "sound" not in said(done)


def of_qemu(states: Sequence[State]) -> Maker:
    memory = GOOD["memory"]
    segments = ((memory["id"].encode(), NO_GPA, memory["size_bytes"] // 4096),)
    return whole(states, hypervisor="qemu", config=GOOD, devices=(), segments=segments)


def test_a_sound_stream_of_a_qemu_guest_is_one(tmp_path: Path) -> None:
    done = receive(tmp_path, of_qemu([State("qemu", QEMU)]).raw, "-n")
    assert done.returncode == 76, said(done)
    assert SOUND in said(done)


# The answered form.


def test_a_whole_answered_stream_is_verified_and_refused_at_once(tmp_path: Path) -> None:
    """The stream's source may be waiting, and must not go on; a file has no source."""
    ended = whole(form=ANSWERED)
    for maker in (ended, copy.deepcopy(ended).add(PAD, b"1").add(GO, NONCE)):
        done = receive(tmp_path, maker.raw, "-n")
        assert done.returncode == 76, said(done)
        assert SOUND in said(done) and NO_BHYVE in said(done)
        assert words(done)[0] == "HELLO" and words(done)[-1] == "REFUSED"
        assert not {"ACCEPT", "READY", "FAILED"} & {*words(done)}
    broken = copy.deepcopy(ended).add(GO, NONCE, flip=1).raw
    done = receive(tmp_path, broken, "-n")
    assert done.returncode == 65 and "(GO) at offset 0x" in said(done), said(done)
    assert words(done)[-1] == "REFUSED" and words(done).count("REFUSED") == 1


def test_a_source_that_was_refused_may_go_away(tmp_path: Path) -> None:
    maker = head(Maker(ANSWERED))
    for raw in (maker.raw, copy.deepcopy(maker).add(ABORT, abort(b"refused")).raw):
        done = receive(tmp_path, raw, "-n")
        assert done.returncode == 76 and NO_BHYVE in said(done), said(done)
        assert "sound" not in said(done)


def test_a_stream_that_breaks_before_the_verdict_is_refused(tmp_path: Path) -> None:
    raw = head(Maker(ANSWERED, NO_MEMORY)).raw
    done = receive(tmp_path, raw[:-1], "-n")
    assert done.returncode == 65, said(done)
    assert words(done) in (["HELLO", "REFUSED"], ["HELLO", "SEEN", "REFUSED"])


# Memory.


CAP_BYTES = 128 << 20
# The memory for reading one section: its buffer, its bytes, and the copy with the name.
SECTION_BYTES = 8 << 20


def parts(maker: Maker, name: bytes, size: int, *, zeros: bool) -> None:
    """Add a state of `size` bytes, in parts of 1 MiB, or in one part of zeros."""
    if zeros:
        maker.state_zeros(name, 0, size, flags=1)
        return
    block = bytes(range(256)) * 4096
    for at in range(0, size, len(block)):
        is_last = at + len(block) >= size
        maker.state(name, at // len(block), block[: size - at], flags=is_last)


def large(kind: str) -> bytearray:
    """Return a stream whose states have as many bytes as the cap of all states allows."""
    maker = Maker(KEPT)
    maker.raw = bytearray(maker.raw)  # type: ignore[assignment]  # grows in place
    if kind == "snapshot":
        meta = copy.deepcopy(META)
        for entry in meta["kern_structs"][:3]:
            entry["size"] = 40 << 20
        at = 0
        for entry in [*meta["kern_structs"], *meta["devices"]]:
            entry["file_offset"], at = at, at + entry["size"]
        head(maker).memory(0, [(0, 4096, 1)]).round_end(0, 0, 4096, flags=1)
        maker.state(b"meta", 0, text_of(meta), flags=1)
        for word, key in (("kern", "kern_structs"), ("dev", "devices")):
            for entry in meta[key]:
                parts(maker, f"{word}/{entry['device']}".encode(), entry["size"], zeros=False)
    else:
        head(maker, hypervisor="xen").memory(0, [(0, 4096, 1)]).round_end(0, 0, 4096, flags=1)
        parts(maker, b"machine", CAP_BYTES, zeros=kind == "zeros")
    return maker.time().end().raw  # type: ignore[return-value]


# This stands between pytest and bhyrecv: the memory of a process before exec(2) counts as its own.
PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_bytes(directory: Path, stream: Path, *options: str) -> int:
    """Return the peak memory of a bhyrecv that has to end with the right status."""
    environment = {"BHYSEND_STATE_DIR": str(directory / "state"), "PYTHONPATH": str(ROOT / "lib")}
    command = [sys.executable, "-c", PEAK, sys.executable, str(ROOT / "bhyrecv"), *options]
    with stream.open("rb") as file:
        done = subprocess.run(command, env=environment, stdin=file, stdout=PIPE, check=True)
    status, kib = done.stdout.split()
    assert int(status) == (76 if "-n" in options else 0)
    return int(kib) << 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [("parts", ["-n"]), ("zeros", ["-n"]), ("snapshot", ["-n"]), ("snapshot", ["-S", "there"])],
    ids=["one", "zeros", "many", "files"],
)
def test_states_are_in_memory_once(tmp_path: Path, kind: str, options: list[str]) -> None:
    (tmp_path / "there").mkdir()
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(whole(hypervisor="xen").raw)
    big.write_bytes(large(kind))
    options = [str(tmp_path / word) if word == "there" else word for word in options]
    least = peak_bytes(tmp_path, small, "-n")
    most = peak_bytes(tmp_path, big, *options)
    print(f"{most >> 20} MiB, of which {least >> 20} whatever is read")
    assert most <= least + CAP_BYTES + SECTION_BYTES
    if kind == "snapshot" and "-n" in options:
        # Not all states are in memory: one of 40 MiB is kept until the next is whole.
        assert most <= least + (80 << 20) + SECTION_BYTES
