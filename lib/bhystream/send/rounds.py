"""The memory of one move: live rounds while the guest runs, and the last one.

transfer.py sends a round, and precopy.py decides what comes after the round.
Rounds makes and measures the rounds of one move, and breaks off when the time of
-T is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bhystream.backend.base import Prepared
from bhystream.errors import DowntimeError, InputOutputError
from bhystream.guest import Head
from bhystream.report import Progress
from bhystream.send.job import Begun, SendJob
from bhystream.send.precopy import Decision, Outlook, Round, cures, decide, next_throttle, outlook
from bhystream.send.prediction import Prediction
from bhystream.send.stopwatch import Stopwatch
from bhystream.send.throttle import Throttle
from bhystream.send.transfer import Transfer
from bhystream.stream.format import Form, Type
from bhystream.units import NS, counted, duration, size

# How long a transport may take nothing: while the guest is paused, and after -T with -f.
STALL_SECONDS = 30
# How long a section under way may still take when -T is over.
_BORDER_SECONDS = 1.0
_MORE = "it runs on here; allow more with -d, -r or -T, or pause it anyway with -f"


class Rounds:
    """The rounds of one move.  memory_bytes: the guest's memory size."""

    def __init__(
        self,
        job: SendJob,
        head: Head,
        begun: Begun,
        progress: Progress,
        watch: Stopwatch,
        prepared: Prepared,
    ) -> None:
        """Read nothing yet.  All arguments stay the caller's."""
        self._job = job
        self._begun = begun
        self._limits = job.opts.limits
        self._progress = progress
        self._watch = watch
        self._plan = prepared.plan
        self.memory_bytes = head.layout.size_bytes
        self._prediction = Prediction(
            job.source.fixed,
            job.base,
            str(head.host["hypervisor"]),
            begun.host if begun.talk else "",
            job.opts.hook,
            self.memory_bytes,
            is_early=bool(prepared.plan),
            is_verified=job.opts.verify,
        )
        self._nthreads = self._prediction.nthreads
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
        self._throttle = Throttle(job.source, job.signals.wake)
        self._found: list[Round] = []
        self._is_late = False
        self._done_at_limit = -1

    @property
    def live(self) -> int:
        """Return how many rounds were made while the guest ran."""
        return len(self._found)

    @property
    def throttled(self) -> str:
        """Return how the guest was throttled, for the closing line; "" if it was not."""
        if not self._throttle.most:
            return ""
        return f"throttled by {self._throttle.most} % for {duration(self._throttle.took_ns)}"

    def done(self) -> int:
        """Return a count that grows with the pages read and the bytes written."""
        return self._transfer.walked_pages + self._begun.writer.offset_bytes

    def precopy(self, before_throttle: Callable[[], None]) -> None:
        """Send rounds while the guest runs, until the last dirty set is small enough.

        Interruptible.  before_throttle: called once, before the guest's vCPUs are held back.
        Raises DowntimeError if a limit is reached first, InputOutputError if a write fails,
        what before_throttle raises, GuestError if the throttle fails, and what ends the
        conversation: the destination's failure, or a pipeline that holds the stream back.
        """
        deadline_s = time.monotonic() + self._limits.time_ns / NS
        # The throttle's block is the outer one: no signal raises where it ends.
        with self._throttle, self._job.signals.until(deadline_s, self._out_of_time):
            if self._plan:
                self._begun.writer.section(Type.REHEARSAL, self._plan)
            if self._limits.rounds:
                self._send_live(before_throttle)
            else:
                self._transfer.map_touched()

    def _send_live(self, before_throttle: Callable[[], None]) -> None:
        start_ns = time.monotonic_ns()
        decision = Decision.GO_ON
        while decision == Decision.GO_ON:
            self._progress.enter("round", self.live)
            found = self._transfer.round(rate_bytes=self._limits.rate_bytes)
            self._found.append(found._replace(throttle=self._throttle.percent))
            if self.live == 1:
                self._rehearse()
            now_ns = time.monotonic_ns() - start_ns
            view = self._look_ahead(self._begun.talk.trip_ns if self._begun.talk else 0)
            self._say_round(self._found[-1], self._cures(view))
            decision = decide(self._found, view, self._limits, now_ns)
            if decision == Decision.GIVE_UP:
                raise DowntimeError(
                    f"{self._job.who}: after {counted(self.live, 'round')} and "
                    f"{duration(now_ns)} the last pages would still take "
                    f"{duration(view.copy_ns)}, more than -d {duration(self._limits.downtime_ns)}",
                    "\n".join([_MORE, *self._cures(view)]),
                )
            if decision == Decision.GO_ON:
                self._throttle_more(view, before_throttle)
        if self._begun.talk:
            # Wait until the destination has read all, so the pipeline is empty at the pause.
            self._begun.talk.settle()
            self._look_ahead(time.monotonic_ns() - self._found[-1].end_ns)

    def last(self) -> None:
        """Send the pages that changed since the last round; with --verify, hash all pages anew.

        Called while the guest is paused.  The CPUs of its vCPUs are free then: see scan.py.
        """
        self._is_late = False  # if -T ended in the last live round, that round was still in time
        found = self._transfer.round(last=True, nthreads=self._nthreads)
        if self._job.opts.verify:
            self._progress.enter("paused, hashes after round", self.live)
            self._transfer.hashes()
        self._watch.note(last_ns=time.monotonic_ns() - found.start_ns)

    def learn(self) -> None:
        """Note what the parts of the pause have taken, for the predictions of later moves."""
        if self._watch.predicted:
            self._prediction.learn(self._watch.measured)

    def _out_of_time(self) -> float:
        """Give up, because the time of -T is over; with -f only if the transport takes nothing.

        Called by Signals.until(), also if the throttle has failed.  Returns in how many
        seconds to call again.  Raises DowntimeError, or with -f InputOutputError; and
        what has stopped the throttle.
        """
        self._throttle.check()
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
        known = []
        if self._found:
            known = self._cures(outlook(self._found, self._transfer.npages, self._limits))
        return DowntimeError(
            f"{self._job.who}: -T {duration(self._limits.time_ns)} is over; "
            f"{self._progress.share:.0%} of round {self.live} is done",
            "\n".join([_MORE, *known]),
        )

    def _rehearse(self) -> None:
        """Measure, in the answered forms, what the pipeline holds back, and its rate.

        The bytes that write(2) took in round 0 may still be in buffers.  So wait until the
        destination has read them all, and count the link's part of that time, and the PAD, as
        part of round 0.
        """
        if self._begun.talk is None:
            return
        writer = self._begun.writer
        before = writer.offset_bytes
        settle_ns = self._begun.talk.settle()
        self._found[0] = self._found[0]._replace(
            settle_ns=settle_ns,
            sent_bytes=self._found[0].sent_bytes + writer.offset_bytes - before,
        )

    def _look_ahead(self, delay_ns: int) -> Outlook:
        """Return the outlook, and set the predicted pause, which begins in delay_ns."""
        view = outlook(self._found, self._transfer.npages, self._limits, delay_ns=delay_ns)
        trip_ns = self._begun.talk.trip_ns if self._begun.talk else 0
        self._watch.predicted = self._prediction.parts(view, trip_ns)
        self._progress.predicted_ns = self._watch.predicted.total_ns
        return view

    def _on_batch(self, done_pages: int, sent_pages: int) -> None:
        self._progress.done_pages = done_pages
        self._progress.sent_pages = sent_pages
        self._progress.sent_bytes = self._begun.writer.offset_bytes
        self._progress.work_done, self._progress.work_total = self._transfer.work_pages
        self._progress.tick()
        self._throttle.check()
        if self._begun.talk:
            self._begun.talk.check()
        if self._is_late:
            raise self._late()

    def _cures(self, view: Outlook) -> list[str]:
        """Return a line that says what would make the last pages fit, none if nobody knows."""
        cure = cures(self._found, view, self._limits)
        return [cure] if cure else []

    def _throttle_more(self, view: Outlook, before_throttle: Callable[[], None]) -> None:
        """Throttle the guest from now on, or more than before, if it changes too fast."""
        now = self._throttle.percent
        percent = next_throttle(self._found, view, self._limits)
        if percent > now:
            # No signal may raise while the guest is recorded, or before the thread is known.
            with self._job.signals.deferred():
                if not now:
                    before_throttle()
                self._throttle.set(percent)

    def _say_round(self, found: Round, cure: Sequence[str]) -> None:
        if self._job.opts.verbose:
            predicted_ns, percent = self._progress.predicted_ns or 0, self._throttle.percent
            throttled = [f"throttled by {percent} %"] if percent else []
            self._job.say(
                f"round {self.live - 1}: "
                f"{found.data_pages} pages, {found.zero_pages} zero, {size(found.sent_bytes)} "
                f"in {duration(found.end_ns - found.start_ns)}; "
                + "; ".join([f"pause {duration(predicted_ns)} predicted", *throttled, *cure])
            )
