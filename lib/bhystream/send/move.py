"""One move at the source, from beginning to end.

It is one flat list of steps, in Move.run().  What each step and each failure
means for the guest is handshake.SOURCE's to say: this module does the acts,
and measures.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bhystream import commandline, guest, hypervisors
from bhystream.backend.base import Paused, Source
from bhystream.errors import (
    HELD,
    OK,
    BhyError,
    DowntimeError,
    GoneError,
    GuestError,
    InDoubtError,
    PipeError,
)
from bhystream.guest import State
from bhystream.handover import handshake, state
from bhystream.handover.handshake import Act, At, Event, Machine
from bhystream.handover.standing import asking, in_doubt, with_peer
from bhystream.report import Console, Progress
from bhystream.send.hook import Hook
from bhystream.send.keeper import Keeper
from bhystream.send.offer import Offer, hello_of
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Decision, Outlook, Round, decide, outlook
from bhystream.send.transfer import Transfer, write_head
from bhystream.signals import Signals
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.writer import Writer
from bhystream.units import NS, counted, duration, size

_STDOUT = 1
# Of a transport that takes nothing while the guest is paused.
_STALL_SECONDS = 30
# How long a section under way may still take when -T is over.
_BORDER_SECONDS = 1.0
_MORE = "it runs on here; allow more with -d, -r or -T, or pause it anyway with -f"


class Move:
    """One guest, sent to a pipe."""

    def __init__(self, opts: SendOptions, base: Path, console: Console, signals: Signals) -> None:
        """Nothing is opened yet."""
        self.opts = opts
        self.base = base
        self.console = console
        self.signals = signals
        self.machine = Machine(handshake.SOURCE, At.RUNS, self._do)
        self.rounds: list[Round] = []
        self.keeper: Keeper | None = None
        self.hook: Hook | None = None
        self.paused: Paused | None = None
        self.states: Sequence[State] = ()
        self.writer: Writer | None = None
        self.offer: Offer | None = None
        self.unrecorded: BhyError | None = None
        self.gone: GoneError | None = None
        self.nonce = b""
        self.go_is_out = False
        self.predicted_ns = 0
        self.pause_ns = 0
        self.pause_start_ns = 0
        self.answers_ns = 0
        self.stood_ns = 0
        self.seen_at_limit = -1
        self.is_late = False
        self.plan = b""

    def run(self, source: Source, lock: state.Lock) -> int:
        """Send the guest; return the exit status.  Raises BhyError.

        The caller owns source and lock, and calls recover.recover() on any exception.
        """
        self.source = source
        self.lock = lock
        self.records = state.Records(self.base, "source")
        self.head = source.head()
        self.progress = Progress(
            self.console,
            source.name,
            self.head.layout.npages,
            verbose=self.opts.verbose,
            machine=self.opts.machine,
        )
        self.signals.on_report = self.progress.report
        with self.signals.interruptible():
            self.begin()
            self.prepare()
        self.start_keeper()
        deadline_s = time.monotonic() + self.opts.limits.time_ns / NS
        with self.signals.until(deadline_s, self._out_of_time):
            self.precopy()
        self.pause()
        with self.signals.watching(self.done, _STALL_SECONDS):
            self.copy_last_pages()
        if self.opts.keep:
            self.release()
        with self.signals.watching(self.done, _STALL_SECONDS):
            self.write_state()
        with self.signals.interruptible():
            self.wait_for_hook()
        if self.opts.form == Form.ANSWERED:
            return self.hand_over()
        self.signals.on_deferred = self._too_late
        self.finish()
        return OK if self.opts.keep else HELD

    def begin(self) -> None:
        """Write the head, and wait until the destination has accepted it."""
        form = self.opts.form
        stream_id = secrets.token_bytes(fmt.STREAM_ID_BYTES)
        fd = _STDOUT
        if form == Form.ANSWERED:
            self.offer = Offer(
                self.console,
                self.signals,
                self.source.name,
                self.opts.guest,
                stream_id.hex(),
            )
            fd = self.offer.open(self.base, self.opts.command, self.opts.umask)
        commandline.widen_pipe(fd)
        features = Feature.ZSTD if self.opts.level is not None else Feature(0)
        self.writer = Writer(fd, Header(form, features, stream_id, secrets.randbits(64)))
        write_head(self.writer, self.head)
        self.console.log(f"guest {self.source.name}: stream {stream_id.hex()} begins")
        if self.offer:
            self.offer.begin(self.writer)
            self.console.log(f"guest {self.source.name}: {self.offer.host} can take it")

    def prepare(self) -> None:
        """Let the backend see that the guest can be paused; know how it is found again.

        Not before the destination's verdict: a move that is refused leaves the
        guest alone.  A destination may start early by what the backend has
        learned; not one whose disks come with the pause (-p), and a kept
        stream's is started when somebody wants it.
        """
        assert self.writer is not None
        id_ = self.writer.header.stream_id.hex()
        prepared = self.source.prepare(id_)
        if self.opts.hook is None and not self.opts.keep:
            self.plan = prepared.plan
        self.transfer = Transfer(
            self.source,
            self.head.layout,
            self.writer,
            level=self.opts.level,
            on_batch=self._on_batch,
        )
        self.record = state.Record(
            id=id_,
            guest=self.source.name,
            operand=self.opts.guest,
            lock=self.source.lock_name,
            phase=guest.PAUSED,
            revive=dict(prepared.record),
            ask=asking(self.opts.command),
        )
        told = state.Told(self.base, self.source.lock_name)
        for warning in told.new(self.source.warnings(), everything=self.opts.verbose):
            self.console.say(f"guest {self.source.name}: {warning}")

    def precopy(self) -> None:
        """Send rounds while the guest runs, until the last set is small enough."""
        assert self.writer is not None
        if self.plan:
            self.writer.section(Type.REHEARSAL, self.plan)
        limits = self.opts.limits
        start_ns = time.monotonic_ns()
        decision = Decision.GO_ON if limits.rounds else Decision.STOP
        while decision == Decision.GO_ON:
            self.progress.enter("round", len(self.rounds))
            self.rounds.append(self.transfer.round(rate_bytes=limits.rate_bytes))
            if len(self.rounds) == 1:
                self.rehearse()
            now_ns = time.monotonic_ns() - start_ns
            view = outlook(self.rounds, self.transfer.npages, limits)
            self._predict(view)
            self._say_round(self.rounds[-1])
            decision = decide(self.rounds, self.transfer.npages, limits, now_ns)
            if decision == Decision.GIVE_UP:
                raise DowntimeError(
                    f"guest {self.source.name}: after {counted(len(self.rounds), 'round')} and "
                    f"{duration(now_ns)} the last pages would still take "
                    f"{duration(view.copy_ns)}, more than -d {duration(limits.downtime_ns)}",
                    _MORE,
                )
        if self.offer and self.rounds:
            # Nothing is left in the pipeline when the guest is paused.
            self.offer.settle()
            self._predict(outlook(self.rounds, self.transfer.npages, limits))

    def _out_of_time(self) -> float:
        """Give up, as -T is over; with -f only when nothing is taken any more.

        Returns in how many seconds to look again.
        """
        assert self.writer is not None
        if not self.opts.limits.finish:
            if self.is_late or self.writer.at_border:
                raise self._late()
            # The destination would be told nothing by a stream that ends inside a section.
            self.is_late = True
            return _BORDER_SECONDS
        before, self.seen_at_limit = self.seen_at_limit, self.done()
        if self.seen_at_limit == before:
            raise PipeError(
                f"-T {duration(self.opts.limits.time_ns)} is over, and "
                f"nothing was taken from the stream for {_STALL_SECONDS} s"
            )
        return _STALL_SECONDS

    def _late(self) -> DowntimeError:
        return DowntimeError(
            f"guest {self.source.name}: -T {duration(self.opts.limits.time_ns)} is over; "
            f"{self.progress.share:.0%} of round {len(self.rounds)} is done",
            _MORE,
        )

    def rehearse(self) -> None:
        """Learn, in the answered forms, what the pipeline holds back, and what it carries.

        What write(2) took in round 0 may lie in buffers; when the destination
        has read it all, the time of the way is that of the round.
        """
        if self.offer is None:
            return
        assert self.writer is not None
        before, start_ns = self.writer.offset_bytes, time.monotonic_ns()
        self.offer.settle()
        spent_ns = time.monotonic_ns() - start_ns
        first = self.rounds[0]
        self.rounds[0] = replace(
            first,
            end_ns=first.end_ns + spent_ns,
            write_ns=first.write_ns + spent_ns,
            sent_bytes=first.sent_bytes + self.writer.offset_bytes - before,
        )

    def _predict(self, view: Outlook) -> None:
        """Note the pause that is to be expected, with the ways of END and of GO."""
        trips_ns = 2 * self.offer.trip_ns if self.offer else 0
        found_ns = view.copy_ns + view.scan_ns + trips_ns + self.source.fixed_ns()
        self.predicted_ns = self.progress.predicted_ns = found_ns

    def start_keeper(self) -> None:
        """Start the keeper: long before the pause, or pages change while it starts."""
        answers = self.offer.answer_fd if self.offer else -1
        self.keeper = Keeper(self.base, self.record, self.lock, answers)

    def done(self) -> int:
        """Return a count that grows with what is read of the guest and what is written."""
        assert self.writer is not None
        return self.transfer.walked_pages + self.writer.offset_bytes

    def pause(self) -> None:
        """Record what is coming, pause the guest with its state taken."""
        if self.keeper and not self.keeper.is_alive():
            self.start_keeper()
        self.source.require_described()
        self.signals.ignore_stops()
        self.machine.on(Event.PAUSE)
        self.progress.enter("paused, round", len(self.rounds))

    def copy_last_pages(self) -> None:
        """Send what changed since the last look; the guest is paused."""
        self.is_late = False  # -T was over as the last live round ended, and that was soon enough
        last = self.transfer.round(last=True)
        self.last_ns = last.end_ns - last.start_ns
        self.console.clear()  # the destination's lines often come to the same terminal
        assert self.paused is not None
        for reason in self.paused.reasons:
            self.console.say(f"guest {self.source.name}: {reason}")

    def release(self) -> None:
        """Resume a kept guest: its copy is complete."""
        with self.signals.interruptible():
            self.wait_for_hook()
        self._require_paused()
        self.machine.on(Event.COPIED_KEPT)
        self.pause_ns = self.stood_ns
        self.progress.enter("runs again, round", len(self.rounds))

    def write_state(self) -> None:
        """Write the state sections and the time."""
        assert self.writer is not None
        for item in self.states:
            self.writer.state(item)
        paused_for_ns = time.monotonic_ns() - self.pause_start_ns
        if self.opts.keep:
            paused_for_ns = self.pause_ns
        self.writer.section(Type.TIME, fmt.TIME.pack(self.paused_at_ns, paused_for_ns))

    def wait_for_hook(self) -> None:
        """Wait until the -p command has ended well."""
        if self.hook:
            self.hook.wait()
            self.hook = None
            if self.keeper:
                self.keeper.tell_hook(0)

    def finish(self) -> None:
        """Write END, in the forms without answers: the guest is held here, or runs again."""
        assert self.writer is not None
        self.writer.sync()
        if self.opts.keep:
            self.writer.end()
        else:
            self._require_paused()
            self.machine.on(Event.COPIED_PLAIN)
        self.writer.sync()
        self.dismiss_keeper()
        self.signals.forget()
        self._say_end("kept, it runs on here" if self.opts.keep else "held here")
        if not self.opts.keep:
            name = self.source.name
            self.console.say(f"when it runs at the destination: bhysend --discard {name}")
            self.console.say(f"when it surely does not: bhysend --resume {name}")

    def hand_over(self) -> int:
        """Write END; on READY write GO; on RUNNING end the guest here.

        Returns 0, or raises what the answer to GO means for the guest.
        """
        assert self.offer is not None
        start_ns = time.monotonic_ns()
        if self.offer.box.nonce is not None:
            raise GuestError(f"{self.offer.host}: READY came before END")
        self._require_paused()
        with self.signals.interruptible():
            self.machine.on(Event.COPIED)
            self.nonce = self.offer.await_ready(self.head.layout.size_bytes)
        try:
            self._require_paused()
        except GoneError as gone:
            # What waits there is the only copy now.
            self.console.say(f"{gone}; {self.offer.host} has all of it, so it goes on there")
        # Before GO: a signal that comes right behind it is told so too.
        self.offer.commit()
        self.machine.on(Event.READY)
        event, why = self.offer.await_outcome()
        self.pause_ns = time.monotonic_ns() - self.pause_start_ns
        self.answers_ns = time.monotonic_ns() - start_ns
        self.machine.on(event)
        self.dismiss_keeper()
        self.signals.forget()
        host = self.offer.host
        if event == Event.FAILED:
            raise GuestError(f"{host}: {why}")
        if event == Event.DOUBT:
            raise InDoubtError(
                f"guest {self.source.name}: in doubt: it was to start on {host}, and {why}",
                in_doubt(self.record, self.base),
            )
        self._say_end(f"it runs on {host}, and is gone here")
        return OK

    def close(self, status: int) -> None:
        """End the conversation, in the answered forms, with this exit status."""
        if self.offer:
            self.offer.close(status)

    def dismiss_keeper(self) -> None:
        """End the keeper: the record says all, or nothing, from here on."""
        if self.keeper:
            self.keeper.dismiss()

    # The acts of handshake.SOURCE.

    def _do(self, act: Act) -> None:
        acts: dict[Act, Callable[[], None]] = {
            Act.RECORD_PAUSED: self._record_paused,
            Act.RECORD_HELD: lambda: self._record(guest.HELD),
            Act.RECORD_GO: self._record_go,
            Act.RECORD_MOVED: self._record_moved,
            Act.FORGET: lambda: self.records.remove(self.record.id),
            Act.PAUSE: self._pause,
            Act.RESUME: self._resume,
            Act.DISCARD: self._discard,
            Act.WRITE_END: self._write_end,
            Act.WRITE_GO: self._write_go,
        }
        acts[act]()

    def _record(self, phase: str) -> None:
        assert self.keeper is not None
        self.record = replace(self.record.moved(phase), keeper=self.keeper.pid)
        try:
            self.records.write(self.record)
        except BhyError as error:
            self.unrecorded = self.unrecorded or error
            raise

    def _record_paused(self) -> None:
        if self.record.phase == guest.PAUSED and not self.pause_start_ns:
            return self._record(guest.PAUSED)
        # Taken back: it says so for the keeper's sake; without it we resume
        # all the same.
        with contextlib.suppress(BhyError):
            self._record(guest.PAUSED)
        return None

    def _record_go(self) -> None:
        assert self.offer is not None
        self.record = with_peer(self.record, hello_of(self.offer))
        self._record(guest.GO)

    def _record_moved(self) -> None:
        # Only for a keeper that has to end the guest in our place.
        with contextlib.suppress(BhyError):
            self._record(guest.MOVED)

    def _pause(self) -> None:
        name = self.source.name
        to = self.offer.host if self.offer else "a pipe"
        self.console.log(f"guest {name}: pausing, stream {self.record.id}, to {to}")
        self.paused_at_ns = time.time_ns()
        self.pause_start_ns = time.monotonic_ns()
        self.paused = self.source.pause()
        self.states = self.paused.states()
        self.state_ns = time.monotonic_ns() - self.pause_start_ns
        if self.opts.hook is not None:
            # Not before: until then the guest writes to its disks.
            self.hook = Hook(self.opts.hook, name, self.record.id, self.opts.umask)
            if self.keeper:
                self.keeper.tell_hook(self.hook.group)

    def _require_paused(self) -> None:
        assert self.paused is not None
        self.paused.require_paused()

    def _resume(self) -> None:
        self._let_run_on()
        self.stood_ns = time.monotonic_ns() - self.pause_start_ns

    def _let_run_on(self) -> None:
        if self.paused is not None:
            return self.paused.resume()
        # pause() failed, and may not have undone what it did.  The hypervisor
        # may serve one client at a time.
        self.source.close()
        paused = hypervisors.open_paused(self.record.revive)
        try:
            paused.resume()
        finally:
            paused.close()

    def _discard(self) -> None:
        assert self.paused is not None
        self.paused.discard(self.record.there)

    def _write_end(self) -> None:
        assert self.writer is not None
        self.writer.end()
        self.pause_ns = time.monotonic_ns() - self.pause_start_ns

    def _write_go(self) -> None:
        assert self.writer is not None
        self.writer.section(Type.GO, self.nonce)
        self.go_is_out = True
        to = self.record
        self.console.log(f"guest {to.guest}: GO, stream {to.id}, to {to.there}")

    def _on_batch(self, done_pages: int, sent_pages: int) -> None:
        assert self.writer is not None
        self.progress.done_pages = done_pages
        self.progress.sent_pages = sent_pages
        self.progress.sent_bytes = self.writer.offset_bytes
        self.progress.work_done, self.progress.work_total = self.transfer.work_pages
        self.progress.tick()
        if self.offer:
            self.offer.box.check()
        if self.is_late:
            raise self._late()

    def _too_late(self, name: str) -> None:
        self.console.say(f"{name}: too late, END is on its way; waiting until it is written")

    def _say_round(self, found: Round) -> None:
        if self.opts.verbose:
            self.console.say(
                f"guest {self.source.name}: round {len(self.rounds) - 1}: "
                f"{found.data_pages} pages, {found.zero_pages} zero, {size(found.sent_bytes)} "
                f"in {duration(found.end_ns - found.start_ns)}; "
                f"pause {duration(self.predicted_ns)} predicted"
            )

    def _say_end(self, what: str) -> None:
        assert self.writer is not None
        parts = [f"state {duration(self.state_ns)}", f"last pages {duration(self.last_ns)}"]
        if self.offer:
            parts.append(f"answers {duration(self.answers_ns)}")
        if self.rounds:
            parts.append(f"{duration(self.predicted_ns)} predicted")
        text = (
            f"guest {self.source.name}: {what}; {counted(self.writer.rounds, 'round')}, "
            f"{size(self.writer.offset_bytes)}; paused {duration(self.pause_ns)} "
            f"({', '.join(parts)})"
        )
        self.console.say(text)
        self.console.log(text)
