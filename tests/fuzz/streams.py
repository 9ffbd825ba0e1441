"""Targets that read a stream: the package's own reader, and bhyrecv up to the start of a guest.

The reader made from the page alone (spec_reader) says what is right.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence

import xxhash

from bhystream import hypervisors
from bhystream.guest import Head, Json, State
from bhystream.handover import answers
from bhystream.memory.extent import EXTENT
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing
from bhystream.recv import arrival, main, reply
from fuzz.seal import seal
from fuzz.target import MIB, fail, limited
from spec_reader import Refused, Stream, read
from support.both import compare
from support.streams import NONCE

# All states have at most 128 MiB: they arrive in a buffer that grows, and are copied once.
READ_BYTES = 320 * MIB


def walk(data: bytes) -> None:
    """Read a stream with both readers, the package's within its bound of memory."""
    compare(data, lambda: limited(READ_BYTES))


def sealed(data: bytes) -> None:
    """Read a stream, made to pass its checksums, as walk() does."""
    walk(seal(data))


class _Keeper:
    """A target that keeps the pages in a dict."""

    def __init__(self, memory: dict[int, bytes]) -> None:
        self.memory = memory

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        at = 0
        for first, count, kind in EXTENT.iter_unpack(extents):
            if first < base_page or first + count > base_page + npages:
                fail("pages outside the segment")
            for number in range(first, first + count) if not kind else ():
                self.memory[number] = bytes(pages[at : at + 4096])
                at += 4096
            for number in [one for one in self.memory if kind and first <= one < first + count]:
                del self.memory[number]

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        on_step()
        given, wrong, made = iter(hashes.cast("Q")), [], array("Q", [0])
        for first, count, kind in EXTENT.iter_unpack(extents):
            if kind:
                wrong += [
                    n for n, page in self.memory.items() if first <= n < first + count and any(page)
                ]
            for number in range(first, first + count) if not kind else ():
                hasher.hash_pages(self.memory.get(number, bytes(4096)), made)
                wrong += [number] if made[0] != next(given) else []
        return Differing(len(wrong), min(wrong, default=-1))


class MemorySink:
    """base.Sink that keeps the guest in memory, and starts nothing."""

    def __init__(self) -> None:
        self.may_have_run = False
        self.notices: Sequence[str] = []
        self.on_wait: Callable[[], None] = lambda: None
        self.memory: dict[int, bytes] = {}
        self.states: list[State] = []
        self.started = 0
        self._segments = 0

    def check(self, head: Head) -> list[str]:
        self._segments = len(head.layout.segments)
        return []

    def late_reasons(self) -> list[str]:
        return []

    def description(self, head: Head) -> Sequence[str]:
        return ()

    def disks(self) -> dict[str, str]:
        return {"disk0": os.devnull}

    def open(self, plan: bytes) -> Sequence[_Keeper]:
        return [_Keeper(self.memory)] * self._segments

    def require_alive(self) -> None:
        if self.started:
            fail("pages came after the start")

    def load(self, states: Sequence[State]) -> None:
        self.states = list(states)

    def advance_clocks(self, ns: int) -> int:
        return 0

    def start(self) -> None:
        self.started += 1

    def settle(self) -> None:
        """Do nothing: it has no network."""

    def leave_paused(self) -> None:
        fail("nobody asked for -u")

    def record(self) -> Json:
        return {"hypervisor": "none"}

    def abort(self) -> None:
        if self.started:
            fail("a started guest was ended")


class Rig:
    """Standard input, the answers, standard error and a state directory for bhyrecv's main()."""

    def __init__(self) -> None:
        self._stdin = os.memfd_create("stdin")
        self._answers = os.memfd_create("answers")
        self._directory = tempfile.mkdtemp()
        self.sink = MemorySink()
        self.said = ""
        os.environ["BHYSEND_STATE_DIR"] = f"{self._directory}/s"
        # vm-bhyve's guests and real hypervisors are out of reach: every guest goes to the sink.
        hypervisors.open_sink = lambda *_: (self.sink, "web1", "web1")
        main._STDIN = self._stdin
        reply._STDOUT = self._answers
        setattr(arrival, "os", _FixedRandom)  # noqa: B010

    def receive(self, data: bytes, *argv: str) -> tuple[int, list[str], int]:
        """Run bhyrecv; return its status, the words of its answers, and how much it has read."""
        for fd in (self._stdin, self._answers):
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        os.pwrite(self._stdin, data, 0)
        self.sink = MemorySink()
        with self._quiet():
            status = main.main(argv)
        shutil.rmtree(f"{self._directory}/s/destination", ignore_errors=True)
        said = os.pread(self._answers, 1 << 20, 0).splitlines(keepends=True)
        words = [answers.unpack(line).word for line in said]
        return status, words, os.lseek(self._stdin, 0, os.SEEK_CUR)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        before, sys.stderr = sys.stderr, io.StringIO()
        try:
            yield
            self.said = sys.stderr.getvalue()
        finally:
            sys.stderr = before


class _FixedRandom:
    """arrival's os: the nonce of READY is known, so that a stream can hold the right GO."""

    @staticmethod
    def urandom(nbytes: int) -> bytes:
        return NONCE[:nbytes]


_rig: list[Rig] = []


def rig() -> Rig:
    if not _rig:
        _rig.append(Rig())
    return _rig[0]


def receive(data: bytes) -> None:
    """Receive a stream, made to pass its checksums: nothing but a sound one starts a guest."""
    raw = seal(data)
    status, words, nread = rig().receive(raw)
    sink = rig().sink
    _require_told(status)
    if (status == 0) != (sink.started == 1):
        fail(f"status {status}, but {sink.started} starts")
    if "RUNNING" in words and not sink.started:
        fail("RUNNING, but nothing was started")
    if sink.started:
        found = _sound(raw[:nread])
        if not (found.what or 0) & 1 and found.nonce != NONCE:
            fail("neither END nor GO has allowed the start")
        if found.memory != {at: one for at, one in sink.memory.items() if any(one)}:
            fail("the guest has other pages")
        if not _has_hashes(found):
            fail("the guest has other pages than the source's hashes say")
        needed = {one.name: one.data for one in sink.states if not one.is_optional}
        if found.states != needed:
            fail("the guest has other states")


def _has_hashes(found: Stream) -> bool:
    """Say whether the memory of a stream is what its HASHES say."""
    for first, count, digest in found.hashes:
        pages = [n for n in found.memory if first <= n < first + count]
        if digest is None and pages:
            return False
        page = found.memory.get(first, bytes(4096))
        if digest is not None and digest != xxhash.xxh3_64_intdigest(page, found.header.seed):
            return False
    return True


def judge(data: bytes) -> None:
    """Verify a stream, made to pass its checksums: only a sound one is called sound."""
    raw = seal(data)
    status, _, _ = rig().receive(raw, "-n")
    _require_told(status)
    if rig().sink.started:
        fail("-n has started a guest")
    if status == 0 or "is sound" in rig().said:
        _sound(raw)


def _require_told(status: int) -> None:
    if status == 70 or "Traceback" in rig().said:
        fail(rig().said)
    if status and not 64 <= status <= 77:
        fail(f"status {status}")
    if not all(line.isprintable() for line in rig().said.split("\n")):
        fail(f"not printable: {rig().said!r}")


def _sound(raw: bytes) -> Stream:
    try:
        return read(io.BytesIO(raw))
    except Refused as refused:
        fail(f"bhyrecv has taken a broken stream: {refused}")
