"""What the engine asks of a hypervisor: the Source and Sink protocols.

The engine moves pages and sections and knows no hypervisor; a backend knows
one hypervisor and no stream.  Everything that crosses this line is here.

Page numbers count through the segments of the layout in order, as in the
LAYOUT section of bhystream(5): page 0 is the first page of segment 0, and the
first page of segment 1 follows the last of segment 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PAGE_BYTES = 4096

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """One contiguous piece of the guest's memory.

    name: at most 31 ASCII bytes.  gpa: guest physical address in bytes, or
    None where the hypervisor does not state one.  npages: pages of 4 KiB.
    """

    name: str
    gpa: int | None
    npages: int


@dataclass(frozen=True)
class Head:
    """What cannot change while the guest runs: the head sections of a stream.

    host: the sending host and its hypervisor.  config: the guest.  devices:
    names of the emulated devices, in the hypervisor's order.
    """

    host: Json
    layout: tuple[Segment, ...]
    config: Json
    devices: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """One named blob of device or vCPU state, opaque to us."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Destination:
    """Where the pages of one segment go: a file and the offset of its page 0.

    The descriptor stays the sink's; the engine only writes to it (pwrite(2))
    and punches holes.
    """

    fd: int
    offset_bytes: int


class Source(Protocol):
    """A running guest that is to be sent.

    Opening one pauses nothing and changes nothing.  All methods raise
    GuestError when the hypervisor fails, AccessError where it may not be
    asked, IncompatibleError for what cannot be moved.

    is_live: whether memory() shows the guest before pause(); if not, there are
    no rounds.
    """

    is_live: bool

    @property
    def name(self) -> str:
        """The guest's name, [A-Za-z0-9._-]{1,64}."""

    @property
    def lock_name(self) -> str:
        """What one lock per guest is taken on: the same for every path to it."""

    def head(self) -> Head:
        """Return what goes into the head sections."""

    def resources(self) -> Sequence[str]:
        """Return what the destination's operator has to give, as -o words: "disk0="."""

    def warnings(self) -> Sequence[str]:
        """Return what no tool can mend and the operator has to know, each in one line."""

    def prepare(self, id_: str) -> None:
        """Make ready what the pause needs and can be made while the guest runs.

        id_: of the stream.  Called once, before revive() and memory(), never
        by a dry run.  close() undoes it if the guest was not paused.
        """

    def memory(self) -> Sequence[memoryview]:
        """Return one read-only mapping per segment, len = npages * 4096.

        The mappings live until close() and show the guest's memory as it
        changes.  Reading a page outside touched() may allocate it.
        """

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents [first, end) of pages that may be other than zero.

        Ascending, disjoint, none across a segment border; asked anew at each
        round.  Pages outside are zero and must not be read.
        """

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Yield the extents of pages that may have changed since the last call, or None.

        As touched(), of which it may be more or less: what is in neither is
        as it was.  None where the host keeps no such log; then every touched
        page is compared.
        """

    def load_seconds(self) -> float:
        """Return how long the destination may take to load the guest after GO.

        0 where it has loaded it before it says READY.
        """

    def fixed_ns(self) -> int:
        """Return what of a pause no round makes shorter: to stop, to take the state, to load it.

        From experience, ns; it can be measured only in a pause.
        """

    def pause(self) -> None:
        """Stop every vCPU and device.  Returns when nothing writes memory.

        Where it fails the guest may stand paused all the same: resume() follows.
        """

    def states(self) -> Sequence[State]:
        """Return the state of the paused guest, whole, in memory.

        Called once, after pause().  May still change guest memory, so the
        last scan follows it.
        """

    def require_paused(self) -> None:
        """Raise TakenError where somebody has started the paused guest anew meanwhile.

        Asked at the last moment before the destination may start it.
        """

    def resume(self) -> None:
        """Let a guest paused by pause() run on, also after states()."""

    def keep(self) -> str:
        """Make what stands paused outlive this process and its keeper.  Twice is no error.

        Returns the directory where it is kept, "" where its hypervisor does.
        """

    def revive(self) -> Json:
        """Return what a keeper needs to resume or discard the guest without us.

        JSON, handed to `revive.open_paused()`; it holds no secret and no
        descriptor.
        """

    def close(self) -> None:
        """Give up every descriptor and mapping.  The guest stays as it is.  Twice is no error."""


class Sink(Protocol):
    """A guest being built.  Nothing of it runs before start().

    Ownership: what open() made (a process, a memory file, sockets) is the
    sink's until start() or leave_paused() succeeded; abort() before that
    leaves the host as it was found.  Errors are Source's.
    """

    @property
    def may_have_run(self) -> bool:
        """False as long as the guest's vCPUs provably never ran here."""

    def check(self, head: Head) -> list[str]:
        """Compare the head with this host and the given resources.

        Touches nothing.  Returns the reasons why this host cannot take the
        guest, each one line that names the key; [] means that it can.
        """

    def open(self) -> Sequence[Destination]:
        """Make the empty guest and return where each segment's pages go.

        Memory is zero and, where the host allows it, not allocated.
        """

    def load(self, states: Sequence[State]) -> None:
        """Give the device state to the guest; memory is complete by then."""

    def start(self) -> None:
        """Run the loaded guest and let go of it: it outlives us.

        If this raises, may_have_run says whether the guest is ours to undo.
        """

    def leave_paused(self) -> None:
        """Let go of the loaded guest without running it (bhyrecv -u)."""

    def revive(self) -> Json:
        """Return what `revive.open_paused()` needs to find the guest again."""

    def abort(self) -> None:
        """Undo open().  Never raises; may be called at any time, and twice."""


class Paused(Protocol):
    """A guest that stands paused or held, found again from its record.

    What the keeper, --resume and --discard act through.
    """

    def hold(self) -> None:
        """Take hold of what would be lost with bhysend; the guest still runs."""

    def clear(self) -> None:
        """Remove what Source.prepare() made for a guest that was never paused.  Never raises."""

    def resume(self) -> None:
        """Let it run.  A guest that already runs is left alone."""

    def keep(self) -> None:
        """Make what stands paused outlive this process.  Twice is no error."""

    def outlives_us(self) -> bool:
        """Say whether it stays as it is without this process: its memory is not here only."""

    def discard(self, there: str) -> None:
        """End it for good.  A guest that is gone already is no error, one that runs is.

        there: the host that it runs on now, "" if that is not known.
        """

    def is_alive(self) -> bool:
        """Say whether this very guest is here, running or so that it can be resumed."""

    def runs(self) -> bool:
        """Say whether its vCPUs run now."""

    def close(self) -> None:
        """Give up every descriptor; the guest stays as it is."""
