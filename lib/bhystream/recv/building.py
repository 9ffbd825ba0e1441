"""Build a guest at the destination from the verified events of its stream."""

from __future__ import annotations

from collections.abc import Sequence

from bhystream import hypervisors
from bhystream.backend.base import Target
from bhystream.errors import from_oserror
from bhystream.guest import READY, Head, State
from bhystream.handover import leftover
from bhystream.handover.state import Lock, Record
from bhystream.recv.hashed import MemoryComparison
from bhystream.recv.placing import Placer, place_by_splices
from bhystream.recv.receiving import RecvJob, refuse
from bhystream.recv.sampled import Comparison
from bhystream.recv.standstill import Standstill
from bhystream.report import Progress
from bhystream.stream import format as fmt
from bhystream.stream.disks import Disk
from bhystream.stream.format import Form, RoundEnd, Type
from bhystream.stream.verify import Hashes, Pages


class Building:
    """One guest, from the verdict to its loaded state.

    name, operand: the guest's name and operand here.  advanced_ns: by how much start() has
    moved the guest's clocks on.  sink: makes the guest, no part
    of which runs before Sink.start().  Incoming owns the Building, and ends the guest by the sink.
    """

    def __init__(self, job: RecvJob, head: Head) -> None:
        """Open the sink, and lock the guest; nothing is made or judged yet.

        Raises IncompatibleError if the stream's hypervisor or contents are not
        known here, UsageError, GuestError if the guest is locked.
        """
        kind = head.host["hypervisor"]
        self._job = job
        self._head = head
        self.sink, self.name, self.operand = hypervisors.open_sink(
            kind, head.config["name"], job.opts.receiving(job.base, job.walk)
        )
        if contents := hypervisors.open_contents(kind):
            job.walk.understand(contents, head)
        self.lock = Lock(job.base, self.lock_name, f"guest {self.name}")
        self._targets: Sequence[Target] = ()
        self._placer: Placer | None = None
        self._states: list[State] = []
        self.advanced_ns = 0
        self._comparison: Comparison | None = None
        self._memory = MemoryComparison(head.layout, job.walk.header.seed)
        self._progress = Progress(
            job.console,
            self.name,
            head.layout.npages,
            verbose=job.opts.verbose,
            machine=job.opts.machine,
        )

    @property
    def lock_name(self) -> str:
        """Return the name of this guest's lock at this destination."""
        return f"to-{self.operand}"

    def judge(self) -> None:
        """Raise IncompatibleError with every reason why this host cannot take the guest."""
        job = self._job
        if job.opts.directory is None:
            leftover.sweep(job.base, job.records, self.lock_name)
        refuse(job.opts.reasons(self.sink, self._head), self.name)
        job.console.log(f"guest {self.name}: stream {job.id} begins")
        job.signals.on_report = self._progress.report

    def open(self, plan: bytes) -> None:
        """Make the empty guest.  Raises what Sink.open() raises.

        plan: the plan in the REHEARSAL section, with which the hypervisor can be
        started early; b"" if there is none.
        """
        late = self._job.opts.unstarted or self._job.walk.header.form == Form.KEPT
        self._targets = self.sink.open(b"" if late else plan)
        self._placer = place_by_splices(
            self.name, self._job.walk, self._job.source, self._head.layout, self._targets
        )

    def close(self) -> None:
        """Release what the guest's memory was placed by; may be called twice."""
        if self._placer:
            self._placer.close()
        self._placer = None

    def write_pages(self, event: Pages) -> None:
        """Write pages into the guest's memory.  Raises InputOutputError, AccessError."""
        if not self._targets:
            self.open(b"")
        if not event.is_placed:
            self._place(event)
        self._report_pages(event)

    def _place(self, event: Pages) -> None:
        layout, at = self._head.layout, event.segment
        try:
            self._targets[at].place(
                layout.starts[at], layout.segments[at].npages, event.extents, event.pages
            )
        except OSError as error:
            raise from_oserror(error, f"write the memory of guest {self.name}") from error

    def end_round(self, event: RoundEnd) -> None:
        """Report a round, with -v.  Raises GuestError if the hypervisor has ended.

        After the last round nobody asks: the guest stands still, and load() finds that out.
        """
        if not event.is_last:
            self.sink.require_alive()
        self._progress.enter("round", event.round + 1)
        self._progress.work_total = 0
        if self._job.opts.verbose:
            self._job.console.say(
                f"guest {self.name}: round {event.round}: {event.data_pages} pages, "
                f"{event.zero_pages} zero"
            )

    def compare_memory(self, event: Hashes) -> None:
        """Compare pages with the source's hashes.

        sink.on_wait() is called meanwhile: a section may state terabytes of zeros.  Raises
        ChecksumError after the last of the pages if one differs, InputOutputError, AccessError.
        """
        where = self._job.walk.place(Type.HASHES)
        target = self._targets[event.segment]
        try:
            self._memory.compare(target, event, where, self.sink.on_wait)
        except OSError as error:
            raise from_oserror(error, f"read the memory of guest {self.name}") from error

    @property
    def is_compared(self) -> bool:
        """Say whether all of the memory was compared, and is what the source has."""
        return self._memory.is_done

    def compare_disks(self, sampled: Sequence[Disk]) -> None:
        """Begin to compare the disks here with the samples of the source's."""
        seed = self._job.walk.header.seed
        self._comparison = Comparison(self.sink.disks(), sampled, seed)

    @property
    def thread_id(self) -> int | None:
        """Return the native id of the thread that compares disks, None if none does."""
        return self._comparison.thread_id if self._comparison else None

    def require_disks(self) -> None:
        """Raise IncompatibleError if a disk here is not the source's; with -f, say so.

        Waits until all samples are compared.
        """
        reasons = self._comparison.reasons() if self._comparison else []
        if not self._job.opts.force:
            refuse(reasons, self.name)
        for reason in reasons:
            self._job.console.say(f"guest {self.name}: {reason}")

    def take_state(self, state: State) -> None:
        """Keep a state until the whole stream has been verified."""
        self._states.append(state)

    def load(self) -> None:
        """Give the guest its states; Sink.start() then has only to let the guest run.

        Raises what Sink.load() raises.
        """
        if not self._targets:  # no MEMORY section has come
            self.open(b"")
        self.sink.load(self._states)
        self._states.clear()

    def start(self, standstill: Standstill) -> None:
        """Let the guest run, its clocks moved on if that was asked for.

        Raises what Sink.start() raises.
        """
        if self._job.opts.advance_clock:
            self.advanced_ns = self.sink.advance_clocks(standstill.length_ns)
        self.sink.start()

    def record(self) -> Record:
        """Return the record of the loaded guest, which is not written yet."""
        return Record(
            id=self._job.id,
            guest=self.name,
            operand=self.operand,
            lock=self.lock_name,
            phase=READY,
            revive=dict(self.sink.record()),
        )

    def _report_pages(self, event: Pages) -> None:
        """Show how far this round has come, and how much it has sent."""
        last = len(event.extents) - fmt.EXTENT.size
        first, count, _ = fmt.EXTENT.unpack_from(event.extents, last)
        progress = self._progress
        progress.done_pages = first + count
        progress.sent_pages += event.npages
        progress.sent_bytes = self._job.walk.reader.offset_bytes
        if not progress.round:  # round 0 states every page; later rounds, changed pages
            progress.work_done, progress.work_total = first + count, progress.npages
        progress.tick()
