"""A guest without a hypervisor: segments in sparse memory files, and a rebuilder.

MemorySource is a backend.base.Source over one memfd for each segment.  Its
memory is changed with write() and punch(), and its holes are those of the file.
The kernel allocates a page of a memfd even if a mapping only reads the page, so
allocated_bytes() shows a reader that touched a hole.

rebuild() is the other end in plain Python, over bhystream.stream.verify.
"""

from __future__ import annotations

import io
import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bhystream.backend.base import Paused, Prepared
from bhystream.errors import GuestError, Reason
from bhystream.guest import PAGE_BYTES, Fixed, Head, Layout, Segment, State
from bhystream.memory.hole import punch
from bhystream.stream import format as fmt
from bhystream.stream.format import RoundEnd
from bhystream.stream.verify import Ended, Pages, Walk


def seeded() -> random.Random:
    """Return a random source whose seed is printed, and read from BHYSTREAM_SEED."""
    seed = int(os.environ.get("BHYSTREAM_SEED") or random.randrange(2**32))
    print(f"BHYSTREAM_SEED={seed}")
    return random.Random(seed)


class MemorySource:
    """A base.Source over sparse files.  Pages are global page numbers."""

    name = "stand-in"
    lock_name = "stand-in"

    def __init__(self, *npages: int) -> None:
        """npages: of each segment, which is one hole at first."""
        segments = (Segment(f"ram{i}", None, n) for i, n in enumerate(npages))
        self.layout = Layout(tuple(segments))
        self.npages = self.layout.npages
        self.fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        for segment in self.layout.segments:
            fd = os.memfd_create(segment.name)
            size = segment.npages * PAGE_BYTES
            os.truncate(fd, size)
            self.fds.append(fd)
            self._maps.append(mmap.mmap(fd, size, prot=mmap.PROT_READ))
            self._views.append(memoryview(self._maps[-1]))

    def head(self) -> Head:
        return Head(
            host={"hypervisor": "stand-in"},
            layout=self.layout,
            config={"name": self.name},
            devices=("nothing",),
        )

    def resources(self) -> Sequence[str]:
        return ("disk0=", "net0=")

    def disks(self) -> dict[str, str]:
        return {}

    def require_described(self) -> None:
        """Do nothing: the guest's description never changes."""

    def fixed(self) -> Fixed:
        return Fixed(0, 0)

    def warnings(self) -> Sequence[Reason]:
        return ()

    def prepare(self, id_: str) -> Prepared:
        return Prepared({"hypervisor": "stand-in"})

    def changed(self) -> Iterator[tuple[int, int]] | None:
        return None

    def memory(self) -> Sequence[memoryview]:
        return self._views

    def touched(self) -> Iterator[tuple[int, int]]:
        base = 0
        for segment, fd in zip(self.layout.segments, self.fds, strict=True):
            at, size = 0, segment.npages * PAGE_BYTES
            while at < size:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:  # ENXIO: only a hole is left up to the end
                    break
                at = os.lseek(fd, start, os.SEEK_HOLE)
                yield base + start // PAGE_BYTES, base + -(-at // PAGE_BYTES)
            base += segment.npages

    def suspend_vcpus(self) -> None:
        """Do nothing: the guest has no vCPUs."""

    def resume_vcpus(self) -> None:
        """Do nothing."""

    def pause(self, stopping: Callable[[], None] = lambda: None) -> Paused:
        raise GuestError("not asked for here")

    def close(self) -> None:
        for view, mapping, fd in zip(self._views, self._maps, self.fds, strict=True):
            view.release()
            mapping.close()
            os.close(fd)

    def _place(self, page: int) -> tuple[int, int]:
        for segment, fd in zip(self.layout.segments, self.fds, strict=True):
            if page < segment.npages:
                return fd, page * PAGE_BYTES
            page -= segment.npages
        raise IndexError(page)

    def write(self, page: int, data: bytes) -> None:
        """Write at the start of a page."""
        fd, at = self._place(page)
        os.pwrite(fd, data, at)

    def fill(self, data: bytes) -> None:
        """Write at the start of every page."""
        for page in range(self.layout.npages):
            self.write(page, data)

    def punch(self, page: int) -> None:
        """Make a page a hole again."""
        fd, at = self._place(page)
        punch(fd, at, PAGE_BYTES)

    def allocated_bytes(self) -> int:
        return sum(os.fstat(fd).st_blocks for fd in self.fds) * 512

    def contents(self) -> bytes:
        """Return the whole memory, by pread(2), which allocates nothing."""
        parts = zip(self.layout.segments, self.fds, strict=True)
        return b"".join(os.pread(fd, s.npages * PAGE_BYTES, 0) for s, fd in parts)


@dataclass
class Rebuilt:
    """The contents of a stream.  data, zero: the pages of each round, by kind."""

    memory: bytearray
    rounds: list[RoundEnd] = field(default_factory=list)
    data: list[set[int]] = field(default_factory=lambda: [set()])
    zero: list[set[int]] = field(default_factory=lambda: [set()])
    states: list[State] = field(default_factory=list)
    ended: Ended | None = None
    head: Head | None = None


def rebuild(stream: bytes) -> Rebuilt:
    """Verify a stream to its end and rebuild the memory that it carries."""
    walk = Walk(io.BytesIO(stream))
    built = Rebuilt(bytearray())
    for event in walk.events():
        match event:
            case Head():
                built.head = event
                built.memory = bytearray(event.layout.size_bytes)
            case Pages():
                _place_pages(built, event)
            case RoundEnd():
                built.rounds.append(event)
                built.data.append(set())
                built.zero.append(set())
            case State():
                built.states.append(event)
            case Ended():
                built.ended = event
    walk.expect_end_of_input()
    return built


def _place_pages(built: Rebuilt, event: Pages) -> None:
    at = 0
    for first, count, kind in fmt.EXTENT.iter_unpack(event.extents):
        start, size = first * PAGE_BYTES, count * PAGE_BYTES
        if kind == fmt.KIND_DATA:
            built.memory[start : start + size] = event.pages[at : at + size]
            built.data[-1].update(range(first, first + count))
            at += size
        else:
            built.memory[start : start + size] = bytes(size)
            built.zero[-1].update(range(first, first + count))
    assert at == len(event.pages)
