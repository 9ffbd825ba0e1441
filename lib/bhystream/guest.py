"""The constants and data classes by which all modules describe a guest.

Page numbers count through the segments of the layout in order, as in the
LAYOUT section of bhystream(5): page 0 is the first page of segment 0, and the
first page of segment 1 follows the last of segment 0.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

PAGE_BYTES = 4096

GUEST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
# The largest guest that can be moved: these are the caps of bhystream(5).
MAX_GUEST_PAGES = 1 << 36
MAX_STATE_BYTES = 128 << 20
MAX_OPTIONAL_STATE_BYTES = 4 << 20

# The speed of a slow disk: a time limit allows each file of a guest's memory so much time.  A
# destination that could not start the hypervisor early reads such a file before READY.
SLOW_BYTES_PER_SECOND = 100 << 20

# What a record says about its guest; the records and the lists of -l use these words.
PAUSED = "paused"  # source: paused, and nothing was written that could start it elsewhere
HELD = "held"  # source, plain form: END may be out; only the operator resumes it
GO = "in-doubt"  # source: GO may be out
MOVED = "moved"  # source: the guest runs at the destination, and is to be ended here
LOADED = "loaded"  # destination: bhyrecv -u left it paused
READY = "ready"  # destination: verified and loaded; waits for GO
STARTED = "started"  # destination: was started, or may have been
DEAD = "dead"  # destination: never ran and never will, from this stream
PHASES = (PAUSED, HELD, GO, MOVED, LOADED, READY, STARTED, DEAD)

# The names that streams and records use for bhyve.
BHYVE = ("bhyve", "standin")

Json = Mapping[str, Any]


class Segment(NamedTuple):
    """One contiguous piece of the guest's memory.

    name: at most 31 ASCII bytes.  gpa: guest physical address in bytes, or
    None if the hypervisor does not state one.  npages: pages of 4 KiB.
    """

    name: str
    gpa: int | None
    npages: int


class Layout:
    """The guest's memory: its segments in order, and where each begins.

    npages: the pages of all segments.  starts: the first page of each segment.
    """

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        *starts, self.npages = accumulate((one.npages for one in segments), initial=0)
        self.starts = tuple(starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.segments == other.segments

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        return f"Layout(segments={self.segments!r})"

    @property
    def size_bytes(self) -> int:
        """Return the size of the guest's memory, in bytes."""
        return self.npages * PAGE_BYTES

    def segment_of(self, page: int) -> int:
        """Return the index of the segment that a page lies in.  page: in [0, npages)."""
        return bisect_right(self.starts, page) - 1

    def end_of(self, segment: int) -> int:
        """Return the page after the last one of a segment."""
        return self.starts[segment] + self.segments[segment].npages

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield the pages [first, end) of each segment."""
        return ((first, self.end_of(index)) for index, first in enumerate(self.starts))


class Head(NamedTuple):
    """What cannot change while the guest runs: the head sections of a stream.

    host: the sending host and its hypervisor.  config: the guest.  devices:
    names of the emulated devices, in the hypervisor's order.
    """

    host: Json
    layout: Layout
    config: Json
    devices: tuple[str, ...]


class Fixed(NamedTuple):
    """What no round shortens of a pause, and what it depends on.

    state_ns: to stop the guest and take its state.  load_ns: to load the state at the
    destination and start the guest, and what bhyrecv does meanwhile.  vcpus: how many vCPUs
    the guest has, which use none of the host's CPUs in the pause.  is_early: whether a
    destination can start its hypervisor before the pause.
    """

    state_ns: int
    load_ns: int
    vcpus: int = 1
    is_early: bool = False


class State(NamedTuple):
    """One named blob of device or vCPU state, opaque to the engine.

    is_optional: a reader that does not know the state may leave it out.
    """

    name: str
    data: bytes
    is_optional: bool = False
