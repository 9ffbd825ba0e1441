"""Compare sending and receiving a paused guest's memory with a bare write/read loop.

Both move the same bytes between two processes over one pipe into a file in
memory: "bare" with write(2) of 256 KiB from the mapping, read(2) and pwrite(2);
"stream" with everything that bhysend and bhyrecv do to a page.  Turns alternate;
the figure is the ratio of the medians.  "cold": the receiver's file is new in
each turn.  "warm": the receiver's file has all its pages already.

usage: python tests/bench/bench_stream.py [MiB [turns]]
"""

from __future__ import annotations

import io
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from bhystream import commandline
from bhystream.guest import PAGE_BYTES, Head, Layout, Segment
from bhystream.memory.page import scatter
from bhystream.send.transfer import Transfer, write_head
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.verify import Ended, Pages, Walk
from bhystream.stream.writer import Writer

CHUNK = 256 << 10


def memory_file(size: int) -> int:
    """Return a descriptor of an empty file in memory, of `size` bytes."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size)
    return fd


class Paused:
    """A base.Readable with one segment, all of which the guest has touched."""

    name = "bench"

    def __init__(self, fd: int, npages: int) -> None:
        self.layout = Layout((Segment("ram", None, npages),))
        self.map = mmap.mmap(fd, npages * PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)

    def head(self) -> Head:
        """Return a head with the required keys only."""
        return Head({"hypervisor": "none"}, self.layout, {"name": "bench"}, ())

    def memory(self) -> Sequence[memoryview]:
        """Return the one mapping."""
        return [memoryview(self.map)]

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield all pages as one extent."""
        yield 0, self.layout.npages

    def changed(self) -> None:
        """Return None: there is no dirty log."""

    def close(self) -> None:
        """Do nothing: the next turn uses the mapping again."""


def send_bare(source: Paused, fd: int) -> None:
    """Write the mapping in pieces of CHUNK bytes."""
    view = memoryview(source.map)
    for start in range(0, len(view), CHUNK):
        piece = view[start : start + CHUNK]
        while piece:
            piece = piece[os.write(fd, piece) :]


def receive_bare(fd: int, target: int) -> None:
    """Read up to CHUNK bytes at a time, and write them into the target."""
    buffer = memoryview(bytearray(CHUNK))
    raw = io.FileIO(fd, closefd=False)
    at = 0
    while count := raw.readinto(buffer):
        at += os.pwrite(target, buffer[:count], at)


def send_stream(source: Paused, fd: int) -> None:
    """Send a whole stream of one round."""
    writer = Writer(fd, Header(Form.PLAIN, Feature(0), os.urandom(16), 7))
    write_head(writer, source.head())
    Transfer(source, source.layout, writer).round(last=True)
    writer.section(Type.TIME, bytes(16))
    writer.end()


def receive_stream(fd: int, target: int) -> None:
    """Verify a stream and place its pages."""
    npages = 0
    for event in Walk(io.FileIO(fd, closefd=False)).events():
        match event:
            case Head():
                npages = event.layout.npages
            case Pages():
                scatter(target, 0, 0, npages, event.extents, event.pages)
            case Ended():
                return


Send = Callable[[Paused, int], None]
Receive = Callable[[int, int], None]


def turn(source: Paused, target: int, send: Send, receive: Receive) -> float:
    """Move all memory once; return the seconds from the start until the last page is placed."""
    read_fd, write_fd = os.pipe()
    commandline.widen_pipe(write_fd)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(write_fd)
        receive(read_fd, target)
        os._exit(0)
    os.close(read_fd)
    send(source, write_fd)
    os.close(write_fd)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the receiver failed")
    return time.monotonic() - start


def main() -> int:
    """Run the benchmark."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) << 20
    turns = int(sys.argv[2] if len(sys.argv) > 2 else 5)
    fd = memory_file(size)
    block = os.urandom(1 << 20)
    for start in range(0, size, len(block)):
        os.pwrite(fd, block, start)
    source = Paused(fd, size // PAGE_BYTES)
    ways: dict[str, tuple[Send, Receive]] = {
        "bare": (send_bare, receive_bare),
        "stream": (send_stream, receive_stream),
    }
    for kind in ("cold", "warm"):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        target = memory_file(size)
        for count in range(turns + 1):
            for name, (send, receive) in ways.items():
                if kind == "cold":
                    os.close(target)
                    target = memory_file(size)
                spent = turn(source, target, send, receive)
                if count:
                    seconds[name].append(spent)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            low, high = min(seconds[name]), max(seconds[name])
            print(
                f"{kind:5} {name:7} {size / median / 1e9:6.2f} GB/s "
                f"({size / high / 1e9:.2f} to {size / low / 1e9:.2f})  "
                f"{medians['bare'] / median:5.2f} of bare"
            )
        os.close(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
