"""The memory of a guest from one process to another, against a bare write and read loop.

Both sides are processes with one pipe between them.  The clock runs from the start of both
until the receiver has placed the last page and says so, and the sender has heard it.  Every
mapping is made inside the clock, and unmapped after it, when the process exits; the CPU
time is that of the whole process.  The bare loop moves the same bytes without hashes: the best
of write(2) of 16, 64 and 256 KiB out of the mapping, with read(2) into the mapping or into a
buffer and pwrite(2).

    paused   the last round of the answered form: vmsplice(2) where the system has it
    copied   every other round: a running guest, -k, the plain form

    warm     the receiver's file is allocated       cold   it is empty

The limit of a row is what the same system calls reach in pieces of the same size, with one XXH3
of all bytes on each side, and without sections and checks: no program that verifies what it
receives can be faster that way.  Other ways were slower: see recv/placing.py and send/transfer.py.
"""

from __future__ import annotations

import io
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from bhystream import commandline
from bhystream.guest import PAGE_BYTES, Head, Layout, Segment
from bhystream.memory.extent import EXTENT, KIND_DATA
from bhystream.memory.inplace import IN_PLACE_PAGES
from bhystream.memory.splice import splice_pages
from bhystream.memory.target import FileTarget
from bhystream.recv.placing import place_by_splices
from bhystream.recv.reply import TimedInput
from bhystream.send.head import write_head
from bhystream.send.transfer import BATCH_PAGES, Transfer
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.verify import Ended, Pages, Walk
from bhystream.stream.writer import Writer

from .rows import Row, pairs, ratio_row

CHUNKS = (16 << 10, 64 << 10, 256 << 10)
# Targets: the ratio to the bare loop, and CPU seconds per GB to send and to receive.
TARGETS = {
    "paused warm": (1.7, 0.25, 0.25),
    "copied warm": (1.0, 0.4, 0.4),
    "paused cold": (1.0, 0.25, 0.7),
    "copied cold": (0.8, 0.4, 0.8),
}

_SPLICED_BYTES = 512 << 10  # as place_spliced() hashes them
Way = Callable[[int, int, int], None]  # file, its size, the pipe


def memory_file(size: int, *, filled: bool = False) -> int:
    """Return a file in memory, of this size: random, or one hole."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size)
    if filled:
        block = os.urandom(1 << 20)
        for start in range(0, size, len(block)):
            os.pwrite(fd, block[: size - start], start)
    return fd


class Guest:
    """A base.Readable of one segment, all touched."""

    name = "bench"

    def __init__(self, fd: int, npages: int) -> None:
        self.layout = Layout((Segment("ram", None, npages),))
        self.map = mmap.mmap(fd, npages * PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)

    def head(self) -> Head:
        """Return a head of the required keys only."""
        return Head({"hypervisor": "none"}, self.layout, {"name": "bench"}, ())

    def memory(self) -> Sequence[memoryview]:
        """Return the one mapping."""
        return [memoryview(self.map)]

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield all of it."""
        yield 0, self.layout.npages

    def changed(self) -> None:
        """Return that nobody knows."""

    def close(self) -> None:
        """Keep all."""


def bare_sender(chunk: int) -> Way:
    """Return a sender that writes the mapping in pieces."""

    def send(fd: int, size: int, pipe: int) -> None:
        view = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        for start in range(0, size, chunk):
            piece = view[start : start + chunk]
            while piece:
                piece = piece[os.write(pipe, piece) :]

    return send


def came(count: int | None) -> int:
    """Return how many bytes came; a sender that has failed sends no more."""
    if not count:
        raise SystemExit("the sender has ended")
    return count


def bare_receiver(chunk: int, *, is_mapped: bool, is_hashed: bool = False) -> Way:
    """Return a receiver that reads into the mapping, or into a buffer and writes that.

    is_hashed: whether what is in the buffer is hashed before it is written.
    """

    def into_mapping(fd: int, size: int, pipe: int) -> None:
        view = memoryview(mmap.mmap(fd, size))
        raw = io.FileIO(pipe, closefd=False)
        at = 0
        while at < size:
            at += came(raw.readinto(view[at : at + chunk]))

    def into_file(fd: int, size: int, pipe: int) -> None:
        buffer = memoryview(bytearray(chunk))
        raw = io.FileIO(pipe, closefd=False)
        at = 0
        while at < size:
            piece = buffer[: came(raw.readinto(buffer))]
            if is_hashed:
                xxhash.xxh3_64_intdigest(piece)
            at += os.pwrite(fd, piece, at)

    return into_mapping if is_mapped else into_file


def limit_sender(*, in_place: bool) -> Way:
    """Return a sender that hashes the mapping and passes it by vmsplice(2), or writes a copy."""

    def splice(fd: int, size: int, pipe: int) -> None:
        view = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        for first in range(0, size // PAGE_BYTES, IN_PLACE_PAGES):
            extent = memoryview(EXTENT.pack(first, IN_PLACE_PAGES, KIND_DATA))
            xxhash.xxh3_64_intdigest(view[first * PAGE_BYTES :][: IN_PLACE_PAGES * PAGE_BYTES])
            at = 0
            while at < IN_PLACE_PAGES * PAGE_BYTES:
                at += splice_pages(pipe, view, 0, extent, at)

    def copy(fd: int, size: int, pipe: int) -> None:
        view = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        buffer = memoryview(bytearray(BATCH_PAGES * PAGE_BYTES))
        for start in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - start)]
            piece[:] = view[start : start + len(piece)]
            xxhash.xxh3_64_intdigest(piece)
            while piece:
                piece = piece[os.write(pipe, piece) :]

    return splice if in_place else copy


def spliced_receiver(fd: int, size: int, pipe: int) -> None:
    """Receive by splice(2), by way of a pipe of our own, into the file; hash it as it is mapped."""
    view = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
    read_fd, write_fd = os.pipe()
    commandline.widen_pipe(write_fd)
    at = hashed = 0
    while at < size:
        end = at + came(os.splice(pipe, write_fd, size - at))
        while at < end:
            step = min(end, hashed + _SPLICED_BYTES) - at
            at += os.splice(read_fd, fd, step, offset_dst=at)
            if at in (size, hashed + _SPLICED_BYTES):
                xxhash.xxh3_64_intdigest(view[hashed:at])
                hashed = at


def stream_sender(*, in_place: bool) -> Way:
    """Return the sender of bhysend: a stream of one round."""

    def send(fd: int, size: int, pipe: int) -> None:
        guest = Guest(fd, size // PAGE_BYTES)
        writer = Writer(pipe, Header(Form.ANSWERED, Feature(0), os.urandom(16), 7))
        write_head(writer, guest.head())
        Transfer(guest, guest.layout, writer, last_in_place=in_place).round(last=True)
        writer.section(Type.TIME, bytes(16))
        writer.end()

    return send


def receive_stream(fd: int, size: int, pipe: int) -> None:
    """Receive as bhyrecv does: verify every section and page, and place the pages."""
    target, source = FileTarget(fd, 0), TimedInput(pipe)
    walk = Walk(source)
    for item in walk.events():
        match item:
            case Head():
                place_by_splices("bench", walk, source, item.layout, [target])
            case Pages() if not item.is_placed:
                target.place(0, size // PAGE_BYTES, item.extents, item.pages)
            case Ended():
                return


@dataclass(frozen=True)
class Turn:
    """One transfer, in seconds of the clock and of the CPU."""

    clock_s: float
    send_s: float
    receive_s: float


def turn(source: int, target: int, size: int, send: Way, receive: Way) -> Turn:
    """Move everything once."""
    read_fd, write_fd = os.pipe()
    commandline.widen_pipe(write_fd)
    heard, answer = os.pipe()
    ended, end = os.pipe()
    start = time.monotonic()
    receiver = os.fork()
    if not receiver:
        os.close(write_fd)
        receive(target, size, read_fd)
        os.write(answer, b"!")
        os._exit(0)
    sender = os.fork()
    if not sender:
        os.close(read_fd)
        os.close(answer)
        send(source, size, write_fd)
        if not os.read(heard, 1):
            os._exit(1)
        os.write(end, repr(time.monotonic()).encode())
        os._exit(0)
    for fd in (read_fd, write_fd, heard, answer, end):
        os.close(fd)
    spent = []
    for child in (sender, receiver):
        _, status, usage = os.wait4(child, 0)
        if status:
            raise SystemExit("a side of the transfer failed")
        spent.append(usage.ru_utime + usage.ru_stime)
    clock_s = float(os.read(ended, 64)) - start
    os.close(ended)
    return Turn(clock_s, *spent)


def measure(mib: int, turns: int) -> list[Row]:
    """Return the rows of all four, with their CPU seconds per GB."""
    size = mib << 20
    source = memory_file(size, filled=True)
    ways: dict[str, tuple[Way, Way]] = {
        f"bare {chunk >> 10} KiB {'mapping' if is_mapped else 'pwrite'}": (
            bare_sender(chunk),
            bare_receiver(chunk, is_mapped=is_mapped),
        )
        for chunk in CHUNKS
        for is_mapped in (True, False)
    }
    receiver = bare_receiver(BATCH_PAGES * PAGE_BYTES, is_mapped=False, is_hashed=True)
    ways["limit of copied"] = (limit_sender(in_place=False), receiver)
    spliced = spliced_receiver if hasattr(os, "splice") else receiver
    ways["limit of paused"] = (limit_sender(in_place=True), spliced)
    ways["paused"] = (stream_sender(in_place=True), receive_stream)
    ways["copied"] = (stream_sender(in_place=False), receive_stream)
    rows = []
    for kind in ("warm", "cold"):
        found = pairs(_turns(kind, source, size, ways), turns)
        clock = {name: [one.clock_s for one in each] for name, each in found.items()}
        bare = min(
            (name for name in ways if name.startswith("bare")),
            key=lambda name: statistics.median(clock[name]),
        )
        for way in ("paused", "copied"):
            ratio, send_s, receive_s = TARGETS[f"{way} {kind}"]
            rate = size / statistics.median(clock[way]) / 1e9
            rows.append(
                ratio_row(
                    f"{way}, {kind}: against the bare loop",
                    clock[bare],
                    clock[way],
                    ratio,
                    note=f"{rate:.2f} GB/s; {bare}",
                )
            )
            limit = found[f"limit of {way}"]
            spent = (
                statistics.median(getattr(one, f"{side}_s") * 1e9 / size for one in limit)
                for side in ("send", "receive")
            )
            rows.append(
                ratio_row(
                    f"{way}, {kind}: its limit",
                    clock[bare],
                    clock[f"limit of {way}"],
                    None,
                    note="CPU s/GB: {:.2f}, {:.2f}".format(*spent),
                )
            )
            for side, target in (("send", send_s), ("receive", receive_s)):
                per_gb = [getattr(one, f"{side}_s") * 1e9 / size for one in found[way]]
                rows.append(
                    Row(
                        f"{way}, {kind}: CPU s/GB, {side}",
                        statistics.median(per_gb),
                        target,
                        per_gb,
                        at_most=True,
                    )
                )
    os.close(source)
    return rows


def _turns(
    kind: str, source: int, size: int, ways: dict[str, tuple[Way, Way]]
) -> dict[str, Callable[[], Turn]]:
    warm = memory_file(size, filled=True) if kind == "warm" else -1

    def once(send: Way, receive: Way) -> Turn:
        target = warm if warm >= 0 else memory_file(size)
        found = turn(source, target, size, send, receive)
        if warm < 0:
            os.close(target)
        return found

    return {
        name: lambda send=send, receive=receive: once(send, receive)  # type: ignore[misc]
        for name, (send, receive) in ways.items()
    }
