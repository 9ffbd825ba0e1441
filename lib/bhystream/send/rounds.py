"""The memory of one move: live rounds while the guest runs, and the last one.

transfer.py sends a round, and precopy.py decides what comes after the round.
Rounds makes and measures the rounds of one move, and breaks off when the time of
-T is over.
"""

from __future__ import annotations

import time

from bhystream.errors import DowntimeError, InputOutputError
from bhystream.guest import PAGE_BYTES, Head
from bhystream.report import Progress
from bhystream.send.job import Begun, SendJob
from bhystream.send.precopy import Decision, Outlook, Round, decide, outlook
from bhystream.send.scan import threads_for
from bhystream.send.stopwatch import Stopwatch
from bhystream.send.transfer import Transfer
from bhystream.stream.format import Form, Type
from bhystream.units import counted, duration, size

# How long a transport may take nothing: while the guest is paused, and after -T with -f.
STALL_SECONDS = 30
# How long a section under way may still take when -T is over.
_BORDER_SECONDS = 1.0
_MORE = "it runs on here; allow more with -d, -r or -T, or pause it anyway with -f"


class Rounds:
    """The rounds of one move."""

    def __init__(
        self,
        job: SendJob,
        head: Head,
        begun: Begun,
        progress: Progress,
        watch: Stopwatch,
        vcpus: int,
    ) -> None:
        """Read nothing yet.  All arguments stay the caller's.  vcpus: how many the guest has."""
        self._job = job
        self._begun = begun
        self._limits = job.opts.limits
        self._progress = progress
        self._watch = watch
        self._vcpus = vcpus
        self._transfer = Transfer(
            job.source,
            head.layout,
            begun.writer,
            level=job.opts.level,
            # Only in the answered form does the destination say when it has read all pages.
            # Until then the guest stays paused, or the move has failed.
            last_in_place=job.opts.form == Form.ANSWERED,
            on_batch=self._on_batch,
        )
        self._found: list[Round] = []
        self._is_late = False
        self._done_at_limit = -1

    @property
    def live(self) -> int:
        """Return how many rounds were made while the guest ran."""
        return len(self._found)

    @property
    def memory_bytes(self) -> int:
        """Return the guest's memory size."""
        return self._transfer.npages * PAGE_BYTES

    def done(self) -> int:
        """Return a count that grows with the pages read and the bytes written."""
        return self._transfer.walked_pages + self._begun.writer.offset_bytes

    def precopy(self, plan: bytes) -> None:
        """Send rounds while the guest runs, until the last dirty set is small enough.

        plan: the plan that Source.prepare() returned, for the destination, or b"".  Raises
        DowntimeError if a limit is reached first, InputOutputError if a write fails, and
        what ends the conversation: the destination's failure, or a pipeline that holds the
        stream back.
        """
        if plan:
            self._begun.writer.section(Type.REHEARSAL, plan)
        start_ns = time.monotonic_ns()
        decision = Decision.GO_ON if self._limits.rounds else Decision.STOP
        while decision == Decision.GO_ON:
            self._progress.enter("round", self.live)
            self._found.append(self._transfer.round(rate_bytes=self._limits.rate_bytes))
            if self.live == 1:
                self._rehearse()
            now_ns = time.monotonic_ns() - start_ns
            view = self._look_ahead()
            self._say_round(self._found[-1])
            decision = decide(self._found, self._transfer.npages, self._limits, now_ns)
            if decision == Decision.GIVE_UP:
                raise DowntimeError(
                    f"{self._job.who}: after {counted(self.live, 'round')} and "
                    f"{duration(now_ns)} the last pages would still take "
                    f"{duration(view.copy_ns)}, more than -d {duration(self._limits.downtime_ns)}",
                    _MORE,
                )
        if self._begun.talk and self._found:
            # Wait until the destination has read all, so the pipeline is empty at the pause.
            self._begun.talk.settle()
            self._look_ahead()

    def last(self) -> None:
        """Send the pages that changed since the last round.  Called while the guest is paused.

        The CPUs of its vCPUs are free then: see scan.py.
        """
        self._is_late = False  # if -T ended in the last live round, that round was still in time
        found = self._transfer.round(last=True, nthreads=threads_for(self._vcpus))
        self._watch.last_ns = found.end_ns - found.start_ns

    def out_of_time(self) -> float:
        """Give up, because the time of -T is over; with -f only if the transport takes nothing.

        Called by Signals.until().  Returns in how many seconds to call again.  Raises
        DowntimeError, or with -f InputOutputError.
        """
        if not self._limits.finish:
            if self._is_late or self._begun.writer.at_border:
                raise self._late()
            # Let the section end first: inside a section no ABORT can tell the destination why.
            self._is_late = True
            return _BORDER_SECONDS
        before, self._done_at_limit = self._done_at_limit, self.done()
        if self._done_at_limit == before:
            raise InputOutputError(
                f"-T {duration(self._limits.time_ns)} is over, and "
                f"nothing was taken from the stream for {STALL_SECONDS} s"
            )
        return STALL_SECONDS

    def _late(self) -> DowntimeError:
        return DowntimeError(
            f"{self._job.who}: -T {duration(self._limits.time_ns)} is over; "
            f"{self._progress.share:.0%} of round {self.live} is done",
            _MORE,
        )

    def _rehearse(self) -> None:
        """Measure, in the answered forms, what the pipeline holds back, and its rate.

        The bytes that write(2) took in round 0 may still be in buffers.  So wait until the
        destination has read them all, and count that time and the PAD as part of round 0.
        """
        if self._begun.talk is None:
            return
        writer = self._begun.writer
        before, start_ns = writer.offset_bytes, time.monotonic_ns()
        self._begun.talk.settle()
        spent_ns = time.monotonic_ns() - start_ns
        first = self._found[0]
        self._found[0] = first._replace(
            end_ns=first.end_ns + spent_ns,
            write_ns=first.write_ns + spent_ns,
            sent_bytes=first.sent_bytes + writer.offset_bytes - before,
        )

    def _look_ahead(self) -> Outlook:
        """Return the outlook, and set the predicted pause, with the trips of END and GO."""
        view = outlook(self._found, self._transfer.npages, self._limits)
        trips_ns = 2 * self._begun.talk.trip_ns if self._begun.talk else 0
        found_ns = view.copy_ns + view.scan_ns + trips_ns + self._job.source.fixed_ns()
        self._watch.predicted_ns = self._progress.predicted_ns = found_ns
        return view

    def _on_batch(self, done_pages: int, sent_pages: int) -> None:
        self._progress.done_pages = done_pages
        self._progress.sent_pages = sent_pages
        self._progress.sent_bytes = self._begun.writer.offset_bytes
        self._progress.work_done, self._progress.work_total = self._transfer.work_pages
        self._progress.tick()
        if self._begun.talk:
            self._begun.talk.check()
        if self._is_late:
            raise self._late()

    def _say_round(self, found: Round) -> None:
        if self._job.opts.verbose:
            self._job.say(
                f"round {self.live - 1}: "
                f"{found.data_pages} pages, {found.zero_pages} zero, {size(found.sent_bytes)} "
                f"in {duration(found.end_ns - found.start_ns)}; "
                f"pause {duration(self._watch.predicted_ns)} predicted"
            )
