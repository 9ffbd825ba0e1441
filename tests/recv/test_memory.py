"""The memory of bhyrecv whatever a stream says: the bound of bhystream(5), LIMITS, holds.

Every stream here is as large as the caps allow, or claims more.  A hard limit of the kernel, which
counts all private memory that a process may write to, stands in for the measurement: with it each
stream ends as it ends without it.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backend.bhyve_stream import META, states_of, whole
from support.limits import memory_bytes, of_page
from support.streams import (
    CONFIG,
    CONFIG_JSON,
    DEVICES,
    DISKS,
    HASHES,
    HEAD_END,
    HOST,
    LAYOUT,
    MEMORY,
    OPTIONAL,
    PAD,
    PLAIN,
    STATE,
    ZERO,
    Maker,
    before,
    disks,
    layout,
    memory_list,
    page,
)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
CAP = 65536
# What the page says.
SAID = of_page()
WITHOUT_STATES_BYTES = memory_bytes()
STATES_BYTES = SAID["bytes in all states"] + SAID["bytes in all optional states"]

Pieces = Iterator[bytes]


def received(directory: Path, stream: Pieces, limit_bytes: int, *options: str) -> tuple[int, str]:
    """Run bhyrecv with so much memory; return its status and its messages."""
    environment = {"PATH": os.environ["PATH"], "BHYSEND_STATE_DIR": str(directory / "state")}
    environment["PYTHONPATH"] = str(ROOT / "lib")
    limit = ["prlimit", f"--data={limit_bytes}:{limit_bytes}"] if limit_bytes else []
    with (directory / "said").open("w+b") as said:
        command = [*limit, sys.executable, str(ROOT / "bhyrecv"), *options]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said
        )
        assert process.stdin
        try:
            for piece in stream:
                process.stdin.write(piece)
            process.stdin.close()
        except BrokenPipeError:
            process.stdin = None
        status = process.wait()
        said.seek(0)
        return status, said.read().decode()


def host(payload: bytes) -> bytes:
    return Maker().add(HOST, payload).raw


def nested() -> Pieces:
    """Many values, as deep as they may be."""
    one = b"[" * 14 + b"]" * 14
    values = b",".join([one] * ((CAP - 100) // (len(one) + 1)))
    yield host(b'{"hypervisor":"xen","program":"t","x":[' + values[: values.rindex(b",")] + b"]}")


def small_values() -> Pieces:
    yield host(b'{"hypervisor":"xen","program":"t","x":[' + b"[]," * ((CAP - 100) // 3) + b"0]}")


def many_keys() -> Pieces:
    keys = {f"{at:x}": 0 for at in range(6000)}
    yield host(json.dumps({"hypervisor": "xen", "program": "t", **keys}).encode()[:CAP])


def head(*segments: tuple[bytes, int, int], devices: int = 1) -> Maker:
    maker = Maker().add(HOST, b'{"hypervisor":"xen","program":"t"}')
    maker.add(LAYOUT, layout(*segments)).add(CONFIG, CONFIG_JSON)
    names = [f"{at:060d}" for at in range(devices)]
    return maker.add(DEVICES, json.dumps(names).encode()[:CAP]).add(HEAD_END)


def segments(count: int, npages: int) -> list[tuple[bytes, int, int]]:
    size = npages // count
    return [(b"s%d" % at, at * size * 4096, size) for at in range(count)]


def all_the_memory() -> Pieces:
    """64 segments of 2^30 pages, all zero, and then not another byte."""
    maker = head(*segments(64, 1 << 36), devices=1024)
    yield maker.raw
    for at in range(64):
        start = len(maker.raw)
        maker.memory(0, [(at << 30, 1 << 30, ZERO)])
        yield maker.raw[start:]


def full_sections() -> Pieces:
    """MEMORY with as many pages as it may have, and half as many extents."""
    maker = head((b"ram", 0, 1 << 20))
    yield maker.raw
    for first in range(0, 20 * 8192, 8192):
        start = len(maker.raw)
        extents = [
            (at + kind, 1 + 6 * kind, kind)
            for at in range(first, first + 8192, 8)
            for kind in (0, 1)
        ]
        yield maker.memory(0, extents, [page(1)] * 1024).raw[start:]


def no_end_of_rounds() -> Pieces:
    maker = head((b"ram", 0, 1)).memory(0, [(0, 1, ZERO)]).round_end(0, 0, 1)
    yield maker.raw
    for number in range(1, 5000):
        start = len(maker.raw)
        maker.round_end(number, 0, 0)
        yield maker.raw[start:]


def what_is_skipped() -> Pieces:
    maker = head((b"ram", 0, 1))
    yield maker.raw
    for kind in (PAD, OPTIONAL) * 60:
        maker.raw = b""
        yield maker.add(kind, bytes(MIB)).raw


def all_the_samples() -> Pieces:
    """DISKS with as many samples as fit, and then not another byte."""
    given = [(b"d%d" % n, 1 << 40, [(at * 512, 512, at) for at in range(1000)]) for n in range(10)]
    yield before(DISKS, PLAIN).add(DISKS, disks(*given)).raw


def all_the_hashes() -> Pieces:
    """HASHES with as many extents and hashes as one may have, and then the next."""
    maker = head((b"ram", 0, 1 << 20)).memory(0, [(0, 1 << 20, ZERO)])
    maker.round_end(0, 0, 1 << 20, flags=1)
    yield maker.raw
    for first in range(0, 20 << 15, 1 << 15):
        start = len(maker.raw)
        extents = [
            (at + 8 * kind, 8, kind)
            for at in range(first, first + (1 << 15), 16)
            for kind in (0, 1)
        ]
        yield maker.hashes(extents, [page(1)] * 16384).raw[start:]


def a_claim(kind: int, length: int) -> Pieces:
    """A section that says to be this long, and the bytes that it says to have, up to 256 MiB."""
    maker = before(kind, PLAIN)
    yield maker.raw
    yield struct.pack("<IIQQQ", kind, 0, length, maker.count, 0)
    for _ in range(256):
        yield bytes(MIB)


def claimed_counts() -> Pieces:
    """MEMORY that says to have 2^32 - 1 extents and pages."""
    maker = head((b"ram", 0, 1 << 20))
    raw = memory_list(0, [(0, 1, ZERO)], [], nextents=(1 << 32) - 1, npages=(1 << 32) - 1)
    yield maker.add(MEMORY, raw).raw


WITHOUT_STATES: dict[str, Callable[[], Pieces]] = {
    "nested": nested,
    "small values": small_values,
    "many keys": many_keys,
    "all the memory": all_the_memory,
    "full sections": full_sections,
    "rounds": no_end_of_rounds,
    "skipped": what_is_skipped,
    "a long CONFIG": lambda: a_claim(CONFIG, 1 << 40),
    "a long MEMORY": lambda: a_claim(MEMORY, (1 << 64) - 1),
    "a long STATE": lambda: a_claim(STATE, 1 << 32),
    "a long PAD": lambda: a_claim(PAD, 1 << 33),
    "claimed counts": claimed_counts,
    "samples": all_the_samples,
    "long DISKS": lambda: a_claim(DISKS, 1 << 32),
    "hashes": all_the_hashes,
    "long HASHES": lambda: a_claim(HASHES, 1 << 32),
}


@pytest.mark.parametrize("name", WITHOUT_STATES)
def test_no_head_and_no_memory_takes_more(tmp_path: Path, name: str) -> None:
    free = received(tmp_path, WITHOUT_STATES[name](), 0, "-n")
    assert free[0] == 65, free[1]  # each of them is broken, or cut
    assert received(tmp_path, WITHOUT_STATES[name](), WITHOUT_STATES_BYTES, "-n") == free


# The states are kept until END is verified.


def one_of_zeros() -> Pieces:
    """A state of as many zeros as all states may have, in 40 bytes."""
    maker = head((b"ram", 0, 1)).memory(0, [(0, 1, ZERO)]).round_end(0, 0, 1, flags=1)
    yield maker.state_zeros(b"s", 0, 128 * MIB, flags=1).raw


def many_small() -> Pieces:
    """As many states as there may be, of 32 KiB."""
    maker = head((b"ram", 0, 1)).memory(0, [(0, 1, ZERO)]).round_end(0, 0, 1, flags=1)
    yield maker.raw
    for at in range(4096):
        maker.raw = b""
        yield maker.state(b"%0255d" % at, 0, bytes(32768), flags=1).raw


@pytest.mark.parametrize("make", [one_of_zeros, many_small])
def test_no_state_takes_more(tmp_path: Path, make: Callable[[], Pieces]) -> None:
    free = received(tmp_path, make(), 0, "-n")
    assert free[0] == 65 and "the stream ends" in free[1], free[1]
    limit = WITHOUT_STATES_BYTES + STATES_BYTES
    assert received(tmp_path, make(), limit, "-n") == free


def test_a_guest_that_is_built_takes_no_more(tmp_path: Path) -> None:
    """-S keeps all states, and writes them into files: no hypervisor is needed."""
    meta, at = copy.deepcopy(META), 0
    for number, device in enumerate(meta["kern_structs"] + meta["devices"]):
        size = 40 * MIB if number < 3 else device["size"]
        device |= {"size": size, "file_offset": at}
        at += size
    (tmp_path / "free").mkdir()
    (tmp_path / "limited").mkdir()
    stream = whole(states_of(meta, bytes(at))).raw
    free = received(tmp_path, iter([stream]), 0, "-S", str(tmp_path / "free"))
    assert free[0] == 0, free[1]
    limit = WITHOUT_STATES_BYTES + STATES_BYTES
    limited = received(tmp_path, iter([stream]), limit, "-S", str(tmp_path / "limited"))
    assert limited[0] == 0, limited[1]
