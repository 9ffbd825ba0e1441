"""What the engine asks of a hypervisor: Source, Paused and Sink.

The engine moves pages and sections and knows no hypervisor; a backend knows
one hypervisor and no stream.  Everything that crosses this line is here.

The words in which they speak of a guest are guest.py's.  What a hypervisor has
to say of the sections of a stream is asked by their walk: stream/contents.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bhystream.guest import Head, Json, State

# What streams and records call bhyve.
BHYVE = ("bhyve", "standin")


@dataclass(frozen=True)
class Prepared:
    """What Source.prepare() leaves.

    record: JSON from which `hypervisors.open_paused()` finds the guest again,
    without a secret or a descriptor.  plan: what the destination needs to
    start its hypervisor before the pause, for a REHEARSAL section; b"" where
    it needs nothing.
    """

    record: Json
    plan: bytes = b""


class Target(Protocol):
    """Where the pages of one segment go.  The memory is zero at first."""

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Write the pages of the DATA extents, and make those of the ZERO extents zero.

        base_page, npages: the segment, in global page numbers.  extents,
        pages: as in verify.Pages, checked.  Raises OSError.
        """


class Readable(Protocol):
    """A guest's memory, to be read: what a transfer needs.

    Opening one pauses nothing and changes nothing.  All methods raise
    GuestError when the hypervisor fails, AccessError where it may not be
    asked, IncompatibleError for what cannot be moved.
    """

    @property
    def name(self) -> str:
        """The guest's name, [A-Za-z0-9._-]{1,64}."""

    def head(self) -> Head:
        """Return what goes into the head sections."""

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

    def close(self) -> None:
        """Give up every descriptor and mapping.  The guest stays as it is.  Twice is no error."""


class Described(Readable, Protocol):
    """A guest whose destination and operator have to know more than its memory."""

    def resources(self) -> Sequence[str]:
        """Return what the destination's operator has to give, as -o words: "disk0="."""

    def warnings(self) -> Sequence[str]:
        """Return what no tool can mend and the operator has to know, each in one line."""


class Snapshot(Described, Protocol):
    """A guest that does not run: files, which are sent cold."""

    def states(self) -> Sequence[State]:
        """Return the state.  Called after the memory was sent.

        Raises GuestError where the files are no longer what they were.
        """


class Source(Described, Protocol):
    """A running guest that is to be sent.  Errors are Readable's."""

    @property
    def lock_name(self) -> str:
        """What one lock per guest is taken on: the same for every path to it."""

    def prepare(self, id_: str) -> Prepared:
        """Make ready what the pause needs and can be made while the guest runs.

        id_: of the stream.  Called once, after the destination's verdict and
        before memory(), never by a dry run.  Shows early that the guest can be
        paused and saved, and how long that takes.  close() undoes it if the
        guest was not paused.
        """

    def require_described(self) -> None:
        """Raise where the guest is no longer what head() has said of it.

        Called at the last moment before pause(), while the guest runs.
        """

    def fixed_ns(self) -> int:
        """Return what of a pause no round makes shorter: to stop, to take the state, to load it.

        Measured by prepare() where that is possible, else from experience; ns.
        """

    def pause(self) -> Paused:
        """Stop every vCPU and device, and take the state: the guest is its hypervisor's to hold.

        Returns when nothing writes memory any more.  Where it raises, it has
        tried to let the guest run on, and open_paused() of the record may try
        again.
        """


class Paused(Protocol):
    """A guest that stands paused in its own hypervisor.

    Source.pause() returns one, and `hypervisors.open_paused()` finds it again
    from its record, in any process: the keeper, -A, --resume, --discard.
    """

    @property
    def reasons(self) -> Sequence[str]:
        """What of the guest the state does not have, and why, each in one line."""

    def states(self) -> Sequence[State]:
        """Return the state that the pause has saved, whole, in memory; optional ones last."""

    def require_paused(self) -> None:
        """Ask the hypervisor whether it still holds the guest.

        Called at the last moment before the destination may start it.  Raises
        TakenError where somebody else has let it run, GoneError where it has ended.
        """

    def resume(self) -> None:
        """Let it run on.  A guest that runs already is left alone.  Raises GoneError."""

    def clear(self) -> None:
        """Remove what Source.prepare() made for a guest that was never paused.  Never raises."""

    def discard(self, there: str) -> None:
        """End it for good.  A guest that is gone already is no error, one that runs is.

        there: the host that it runs on now, "" if that is not known.
        """

    def is_alive(self) -> bool:
        """Say whether this very guest is here, running or so that it can be resumed."""

    def runs(self) -> bool:
        """Say whether its vCPUs run now."""

    def close(self) -> None:
        """Give up every descriptor; the guest stays as it is.  Twice is no error."""


class Sink(Protocol):
    """A guest being built, of sections that have passed Contents.

    Nothing of it runs before start().

    Ownership: what open() made (a process, a memory file, sockets) is the
    sink's until start() or leave_paused() succeeded; abort() before that
    leaves the host as it was found.  Errors are Readable's.
    """

    @property
    def may_have_run(self) -> bool:
        """False as long as the guest's vCPUs provably never ran here."""

    @property
    def notices(self) -> Sequence[str]:
        """What the operator has to know of a start that succeeded, each in one line."""

    on_wait: Callable[[], None]
    """Called often while open() and load() wait for a hypervisor; raises nothing."""

    def check(self, head: Head) -> list[str]:
        """Compare the head with this host and the given resources.

        Touches nothing.  Returns the reasons why this host cannot take the
        guest, each one line that names the key; [] means that it can.
        """

    def late_reasons(self) -> list[str]:
        """Return the reasons why this host cannot take the guest without a plan.

        As check(), which comes before.  Asked where the memory begins and no
        REHEARSAL has come.
        """

    def open(self, plan: bytes) -> Sequence[Target]:
        """Make the empty guest and return where each segment's pages go.

        plan: of the REHEARSAL section; b"" where there is none, or where the
        guest is not to be started in this move.  Memory is zero and, where the
        host allows it, not allocated.
        """

    def require_alive(self) -> None:
        """Raise GuestError where the hypervisor that open() has started has ended.

        Asked after each round: what failed there is to end the move before
        the pause.
        """

    def load(self, states: Sequence[State]) -> None:
        """Give the device state to the guest; memory is complete by then.

        When it returns, start() has only to let the guest go.
        """

    def start(self) -> None:
        """Run the loaded guest and let go of it: it outlives us.

        If this raises, may_have_run says whether the guest is ours to undo.
        """

    def leave_paused(self) -> None:
        """Let go of the loaded guest without running it (bhyrecv -u)."""

    def record(self) -> Json:
        """Return what `hypervisors.open_paused()` needs to find the guest again."""

    def abort(self) -> None:
        """Undo open().  Never raises; may be called at any time, and twice."""
