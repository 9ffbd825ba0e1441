"""One guest, rebuilt from a stream at the destination.

A guest is built from the events of verify.Walk, in the stream's order, and
no part of the guest runs before END has been verified:

    header   may this stream be started here at all?           answers: HELLO
    head     the verdict, before any memory moves; then an
             empty guest is made                               ACCEPT, REFUSED
    pages    written into its memory, zeros punched out        SEEN
    hashes   if there are any: compared with its memory        SEEN, FAILED
    END      the device state is loaded; in the plain form
             STARTED is recorded, and the guest started        READY
    GO       answered form: STARTED is recorded, and the
             guest started                                     RUNNING, FAILED

Until the hypervisor is told to run the guest, every failure undoes what was
made, and the status (64 to 77) says that nothing was started here.  If the
hypervisor was told, and it is not known whether the guest ran, the guest is left
alone, and the status is 81.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator

from bhystream.errors import BhyError, GuestError, IncompatibleError, InDoubtError, UsageError
from bhystream.guest import LOADED, STARTED, Head, State
from bhystream.handover import leftover, prune
from bhystream.handover.handshake import GO_SECONDS
from bhystream.handover.state import Lock
from bhystream.recv.arrival import Arrival
from bhystream.recv.building import Building
from bhystream.recv.receiving import RecvJob, require_startable
from bhystream.recv.standstill import Standstill
from bhystream.stream.format import Form, RoundEnd, Type
from bhystream.stream.verify import Disks, Ended, Go, Hashes, Item, Pad, Pages, Rehearsal
from bhystream.units import counted, duration, size
from bhystream.urgent import urgently


class Incoming:
    """One guest, rebuilt from standard input.

    is_let_go: the guest is where it was wanted; a later failure changes nothing.
    """

    def __init__(self, job: RecvJob) -> None:
        """Begin; only the header has been read."""
        self._job = job
        self._arrival = Arrival(job)
        self._building: Building | None = None
        self._stream_lock: Lock | None = None
        self.is_let_go = False

    def run(self) -> None:
        """Build and start the guest.  Raises BhyError; then call undo(), and close() in the end."""
        job = self._job
        with job.signals.interruptible():
            job.reply.hello()
        job.source.on_quiet = job.reply.hello if job.is_answered else None
        # The lock is held to the end: it refuses a second bhyrecv of the same
        # stream now, and the record refuses one later.
        self._stream_lock = leftover.lock_stream(job.base, job.id)
        if job.walk.is_dry_run:
            raise UsageError("the stream is a dry run (bhysend -n): read it with bhyrecv -n")
        require_startable(job.opts, job.walk, job.records)
        events = self._events()
        with contextlib.ExitStack() as waited_for:
            with job.signals.at_waits():
                building = self._accept(events)
                ended, standstill = self._build(building, events)
                if job.is_answered:
                    waited_for.enter_context(urgently(building.thread_id))
                job.seen(now=True)
                building.load()
                building.require_disks()
            what = self._finish(building, standstill, events)
            self.is_let_go = True
            self._arrival.say_running()
            standstill.end()
        if not job.opts.unstarted:
            building.sink.settle()
        self._say_end(building, what, ended, standstill)

    def _finish(self, building: Building, standstill: Standstill, events: Iterator[Item]) -> str:
        """Start the guest, or leave it as the operator wants; return where it is now."""
        job = self._job
        if job.opts.directory is not None:
            building.start(standstill)
            return f"its snapshot files are made: {building.operand}"
        if job.is_answered:
            self._await_go(building, standstill, events)
            return "it runs here"
        if job.opts.unstarted:
            self._say_too_late("the guest is loaded")
            self._arrival.record(building.record(), LOADED)
            building.sink.leave_paused()
            return "loaded, paused"
        self._say_too_late("the guest is started")
        self._arrival.record(building.record(), STARTED)
        building.start(standstill)
        return "it runs here"

    def undo(self, error: BhyError) -> BhyError:
        """Leave the host as it was found, and say so in the error's hint.

        A guest that may have run is left alone, with its record: only the
        operator can see whether it runs, and ending it could end the only copy
        that has run on.  Returns the error to raise.
        """
        building = self._building
        if building and building.sink.may_have_run:
            self._arrival.may_have_run()
            return InDoubtError(
                f"guest {building.name}: it may run here: {error}",
                f"see whether {building.operand} runs; until you know, leave the source paused",
            )
        left = self._arrival.fail(str(error))
        error.hint = f"{self._nothing_started()}\n{left}\n{error.hint}"
        return error

    def _nothing_started(self) -> str:
        """Say that this bhyrecv has started nothing, and whether an earlier one has."""
        phase = ""
        with contextlib.suppress(BhyError):
            phase = self._job.records.phase(self._job.id) or ""
        if phase == STARTED:
            return (
                "nothing was started here this time:"
                " an earlier bhyrecv has started the guest of this stream"
            )
        return "nothing was started here"

    def close(self) -> None:
        """Release the locks, and remove old records of earlier streams."""
        if self._building:
            self._building.close()
        for lock in (self._building.lock if self._building else None, self._stream_lock):
            if lock:
                lock.release()
        prune.prune(self._job.base, self._job.records)

    def _events(self) -> Iterator[Item]:
        """Yield the verified events, and answer how far the stream has been read."""
        events = self._job.walk.events()
        while True:
            # Reading may be interrupted, also if it places pages; acting on what was read may not.
            with self._job.signals.interruptible():
                event = next(events, None)
            if event is None:
                raise GuestError("the source gave up: the stream ends without GO")
            yield event
            self._job.seen(now=isinstance(event, Head | RoundEnd | Pad))

    def _accept(self, events: Iterator[Item]) -> Building:
        """Read the head, judge the guest, and answer ACCEPT; return the guest to build."""
        job = self._job
        head = next(event for event in events if isinstance(event, Head))
        building = self._building = Building(job, head)
        building.sink.on_wait = job.signals.check
        self._arrival.take(building.sink)
        building.judge()
        if job.is_answered:
            job.source.on_quiet = None
            building.sink.on_wait = self._wait
            with job.signals.interruptible():
                self._arrival.accept()
        return building

    def _wait(self) -> None:
        """Answer how far the stream has been read; raise Interrupted if a signal has come."""
        self._job.seen(now=False)
        self._job.signals.check()

    def _say_too_late(self, what: str) -> None:
        """Say of every signal from now on that it is too late."""
        console = self._job.console
        self._job.signals.on_deferred = lambda name: console.say(
            f"{name}: too late, {what}; bhyrecv ends as soon as that is done"
        )

    def _build(self, building: Building, events: Iterator[Item]) -> tuple[Ended, Standstill]:
        """Build the guest up to END; return END, and how long the guest stands still."""
        while True:
            match next(events):
                case Rehearsal() as rehearsal:
                    building.open(rehearsal.plan)
                case Pages() as pages:
                    building.write_pages(pages)
                case RoundEnd() as end:
                    building.end_round(end)
                case Hashes() as hashes:
                    building.compare_memory(hashes)
                case State() as state:
                    building.take_state(state)
                case Disks() as sampled:
                    building.compare_disks(sampled.disks)
                case Ended() as ended:
                    return ended, Standstill(ended.time, is_answered=self._job.is_answered)

    def _await_go(self, building: Building, standstill: Standstill, events: Iterator[Item]) -> None:
        """Answer READY; start the guest if GO has the nonce of this READY."""
        job = self._job
        nonce = self._arrival.ready(building.record())
        job.source.deadline = time.monotonic() + GO_SECONDS
        job.source.why = f"no GO came for {GO_SECONDS} s"
        go = next(event for event in events if isinstance(event, Go))
        if not secrets.compare_digest(go.nonce, nonce):
            where = job.walk.place(Type.GO)
            raise IncompatibleError(f"{where}: GO has another nonce: it is not the answer to READY")
        self._say_too_late("the guest is started")
        self._arrival.go(lambda: building.start(standstill))

    def _say_end(self, building: Building, what: str, ended: Ended, standstill: Standstill) -> None:
        """Say where the guest is now, and how long it stood still."""
        job, name = self._job, building.name
        text = (
            f"guest {name}: {what}; {counted(ended.end.rounds, 'round')}, "
            f"{size(job.walk.reader.offset_bytes)}"
        )
        if building.is_compared:
            text += "; its memory is compared with the source's"
        is_moved = job.walk.header.form != Form.KEPT and job.opts.directory is None
        if is_moved and standstill.is_measured:
            text += (
                f"; paused {duration(standstill.measured_ns)},"
                f" {duration(standstill.here_ns)} of it here, plus the transit of END"
            )
        if building.advanced_ns:
            text += f"; its clocks moved on by {duration(building.advanced_ns)}"
        job.console.say(text)
        job.console.log(text)
        for notice in building.sink.notices:
            job.console.say(f"guest {name}: {notice}")
        if job.opts.unstarted:
            job.console.say(f"let it run: bhyrecv --resume {name}")
            job.console.say(f"or end it: bhyrecv --discard {name}")
