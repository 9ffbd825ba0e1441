"""What the engine asks of a hypervisor: Source, Paused and Sink.

The engine moves pages and sections and knows no hypervisor; a backend knows
one hypervisor and no stream.  This file is the interface between the two.

guest.py defines the types that describe a guest.  stream/contents.py defines
how the walk of a stream has a backend check the backend's sections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bhystream.errors import Reason
from bhystream.guest import Fixed, Head, Json, State
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing


@dataclass(frozen=True)
class Prepared:
    """The result of Source.prepare().

    record: JSON from which `hypervisors.open_paused()` finds the guest again;
    the record holds no secret and no descriptor.  plan: what the destination
    needs to start its hypervisor before the pause, for a REHEARSAL section;
    b"" if the destination needs nothing.
    """

    record: Json
    plan: bytes = b""


class Target(Protocol):
    """The memory of one segment at the destination.  All of its pages are zero at first."""

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Write the pages of the DATA extents, and make those of the ZERO extents zero.

        base_page, npages: the segment's first page, in global page numbers, and
        its number of pages.  extents, pages: as in verify.Pages, checked.
        Raises OSError if the pages cannot be written.
        """

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        """Compare the memory, as it is now, with the hashes of the source's.

        hasher: has the stream's seed.  base_page: as for place().  extents, hashes: as in
        verify.Hashes, checked.  on_step: called often; what it raises ends the comparison.
        Memory that was never allocated stays so.  Raises OSError if the memory cannot be read.
        """


class Readable(Protocol):
    """A guest whose memory can be read: what a transfer needs.

    To open a Readable neither pauses nor changes the guest.  All methods raise
    GuestError if the hypervisor fails, AccessError if the caller may not use the
    hypervisor, and IncompatibleError if the guest cannot be moved.
    """

    @property
    def name(self) -> str:
        """The guest's name, [A-Za-z0-9._-]{1,64}."""

    def head(self) -> Head:
        """Return what goes into the head sections."""

    def memory(self) -> Sequence[memoryview]:
        """Return one read-only mapping per segment, len = npages * 4096.

        The mappings live until close() and always show the guest's current
        memory.  Reading a page outside touched() may allocate that page.
        """

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents [first, end) of pages that may be other than zero.

        The extents ascend, are disjoint, and none crosses a segment border.
        Called again in each round.  Pages outside the extents are zero and must
        not be read.
        """

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return an iterator over extents of pages that may have changed, or None.

        The extents are of changes since the last call: the call itself begins the log
        anew, before the first extent is asked for.
        The extents have the form of touched()'s, and may cover more or fewer
        pages: a page in neither has not changed.  Returns None if the host keeps
        no such log; the engine then compares every touched page.
        """

    def close(self) -> None:
        """Release every descriptor and mapping; the guest stays as it is.  May be called twice."""


class Described(Readable, Protocol):
    """A guest that also tells what its destination and its operator have to know."""

    def resources(self) -> Sequence[str]:
        """Return the -o keys that the destination's operator has to give: "disk0="."""

    def warnings(self) -> Sequence[Reason]:
        """Return what the operator has to know and no program can repair."""

    def fixed(self) -> Fixed | None:
        """Return what no further round shortens of the pause; None if there is no pause."""


class Snapshot(Described, Protocol):
    """A guest that does not run: snapshot files, which bhysend sends cold."""

    def states(self) -> Sequence[State]:
        """Return the state.  Called after the memory was sent.

        Raises GuestError if the files have changed since they were opened.
        """


class Source(Described, Protocol):
    """A running guest that is to be sent.  The methods raise what Readable's raise."""

    @property
    def lock_name(self) -> str:
        """The name of the guest's lock: the same name for every path to the guest."""

    def prepare(self, id_: str) -> Prepared:
        """Prepare whatever the pause needs that can be prepared while the guest runs.

        id_: the stream id.  Called once, after the destination's verdict and
        before memory(), never by a dry run.  The call shows early that the guest
        can be paused and saved, and how long that takes.  close() undoes the
        call if the guest was not paused.
        """

    def disks(self) -> Mapping[str, str]:
        """Return the paths on this host of the disks that can be sampled, by their -o keys.

        A disk in an image format, a CD and a disk that QEMU opens by a protocol are left out:
        the same disk may have other bytes at the destination.
        """

    def require_described(self) -> None:
        """Raise one of Readable's errors if the guest no longer matches what head() returned.

        Called at the last moment before pause(), while the guest runs.
        """

    def fixed(self) -> Fixed:
        """Return what no further round shortens of the pause.

        As prepare() measured it, or what is usual if prepare() was not called, or could not.
        """

    def suspend_vcpus(self) -> None:
        """Stop the vCPUs for a moment, for the throttle.  The devices may go on.

        Called after prepare() and before pause(), in a thread of its own, and always followed
        by resume_vcpus().  Raises GuestError if another program has stopped the guest.
        """

    def resume_vcpus(self) -> None:
        """Undo suspend_vcpus(), even if it has raised; leave a running guest alone."""

    def pause(self, stopping: Callable[[], None] = lambda: None) -> Paused:
        """Stop every vCPU and device, and take the state; the hypervisor then holds the guest.

        stopping: called when all is ready, just before the guest is told to stop.
        Returns when nothing writes memory any more.  Before pause() raises, it
        tries to let the guest run on; the caller may try again with
        open_paused() of the record.  The caller closes the Paused before the Source.
        """


class Paused(Protocol):
    """A guest that stands paused in its own hypervisor.

    Source.pause() returns a Paused, and `hypervisors.open_paused()` finds the
    guest again from its record, in any process: the keeper, -A, --resume, --discard.
    """

    @property
    def reasons(self) -> Sequence[str]:
        """The parts of the guest that the state lacks, and why, each in one line."""

    def states(self) -> Sequence[State]:
        """Return the state that the pause has saved, whole, in memory; optional states last."""

    def require_paused(self) -> None:
        """Ask the hypervisor whether it still holds the guest.

        Called at the last moment before the destination may start the guest.
        Raises StaleError if anyone else has let the guest run, GuestEndedError
        if the guest has ended.
        """

    def resume(self) -> None:
        """Let the guest run on; leave a running guest alone.

        Raises GuestEndedError if the guest has ended, GuestError if the guest
        cannot be resumed.
        """

    def clear(self) -> None:
        """Remove what Source.prepare() made for a guest that was never paused.  Never raises."""

    def discard(self, there: str) -> None:
        """End the guest for good.  Do nothing if it has ended; raise GuestError if it runs.

        there: the host that the guest runs on now, "" if that is not known.
        """

    def is_alive(self) -> bool:
        """Say whether this very guest is here, either running or ready to be resumed."""

    def runs(self) -> bool:
        """Say whether the guest's vCPUs run now."""

    def close(self) -> None:
        """Release every descriptor; the guest stays as it is.  May be called twice."""


class Sink(Protocol):
    """A guest that is built from sections that have passed Contents.

    No part of the guest runs before start().

    Ownership: what open() made (a process, a memory file, sockets) is the
    sink's until start() or leave_paused() has succeeded; abort() before that
    leaves the host as it was found.  The methods raise what Readable's raise.
    """

    @property
    def may_have_run(self) -> bool:
        """False as long as the guest's vCPUs provably never ran here."""

    @property
    def notices(self) -> Sequence[str]:
        """What the operator has to know about a start that succeeded, each in one line."""

    on_wait: Callable[[], None]
    """Called often while check(), open(), require_alive() and load() wait for a hypervisor.

    If it raises a BhyError, the wait ends, and abort() undoes what was made.
    """

    def check(self, head: Head) -> list[str]:
        """Compare the head with this host and the given resources.

        Changes nothing on the host.  Returns the reasons why this host cannot
        take the guest, each one line that names the key; [] if the host can.
        """

    def late_reasons(self) -> list[str]:
        """Return the reasons why this host cannot take the guest without a plan.

        The reasons have the form of check()'s.  Called after check(), if the
        memory begins and no REHEARSAL section has come before.
        """

    def disks(self) -> Mapping[str, str]:
        """Return the paths on this host of the disks that Source.disks() samples; after check()."""

    def description(self, head: Head) -> Sequence[str]:
        """Return lines with which this host's manager of guests could have the guest as its own.

        The first line says what the others are, and the others are to be copied as they are.
        () if no manager is here, or knows the guest, or could be told nothing.
        """

    def open(self, plan: bytes) -> Sequence[Target]:
        """Make the empty guest and return one Target for each segment.

        plan: the plan in the REHEARSAL section; b"" if the stream has none, or if the
        guest is not to be started in this move.  The memory is zero and, if the
        host allows that, not allocated.
        """

    def require_alive(self) -> None:
        """Raise GuestError if the hypervisor that open() started has ended.

        Called after each live round, so that a failure at the destination ends the
        move before the pause.
        """

    def load(self, states: Sequence[State]) -> None:
        """Give the device state to the guest, whose memory is complete by then.

        After load(), start() has only to let the guest run.
        """

    def advance_clocks(self, ns: int) -> int:
        """Let the guest's clocks go on as if the guest had not been stopped ns nanoseconds ago.

        ns: 0 if nobody knows.  Called at most once, between load() and start().  Returns by
        how many ns the clocks are moved; 0 if this hypervisor or this guest does not allow it:
        they go on as they were saved, and notices says why.  Raises what start() raises.
        """

    def start(self) -> None:
        """Run the loaded guest and release it: the guest outlives bhyrecv.

        If start() raises, may_have_run says whether abort() may undo the guest.
        """

    def settle(self) -> None:
        """Do what a guest that runs can wait for.  Never raises.

        Called once after start(), when the source has been told that the guest runs: so this
        takes no time of the pause, and is not done if bhyrecv is killed first.
        """

    def leave_paused(self) -> None:
        """Release the loaded guest without running it (bhyrecv -u)."""

    def record(self) -> Json:
        """Return what `hypervisors.open_paused()` needs to find the guest again."""

    def abort(self) -> None:
        """Undo open().  Never raises; may be called at any time, and twice."""
