"""One guest, rebuilt from a stream at the destination.

A guest is built from the events of verify.Walk, in the stream's order, and
nothing of it runs before END has been verified:

    header   may this stream be started here at all?           answers: HELLO
    head     the verdict, before any memory moves; then an
             empty guest is made                               ACCEPT, REFUSED
    pages    written into its memory, zeros punched out        SEEN
    END      the device state is loaded; in the plain form
             STARTED is recorded, and it runs                  READY
    GO       answered form: STARTED is recorded, and it runs   RUNNING, FAILED

Until the hypervisor is told to run it, every failure undoes what was made, and
the status (64 to 77) says that nothing was started here.  If it was told, and
what came of it is not known, the guest is left alone and the status is 81.
In the answered form handshake.DESTINATION says what is done.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bhystream import hypervisors
from bhystream.backend.base import Sink, Target
from bhystream.errors import (
    BhyError,
    GuestError,
    IncompatibleError,
    InDoubtError,
    UsageError,
    from_oserror,
)
from bhystream.guest import DEAD, LOADED, PAGE_BYTES, READY, STARTED, Head, Layout, State
from bhystream.handover import handshake, hold, leftover, prune, state
from bhystream.handover.handshake import GO_SECONDS, Act, Event, Machine, There
from bhystream.recv.options import Options
from bhystream.recv.reply import Reply, TimedInput
from bhystream.report import Console, Progress
from bhystream.signals import Signals
from bhystream.stream import format as fmt
from bhystream.stream.format import Form, RoundEnd, Type
from bhystream.stream.verify import Ended, Go, Pad, Pages, Rehearsal, Walk
from bhystream.stream.verify import Event as VerifiedEvent
from bhystream.units import counted, duration, size


class Build:
    """One guest, rebuilt from standard input."""

    def __init__(
        self,
        opts: Options,
        walk: Walk,
        source: TimedInput,
        base: Path,
        console: Console,
        signals: Signals,
    ) -> None:
        """walk: at the beginning of its events, which come from source."""
        self.opts = opts
        self.walk = walk
        self.source = source
        self.base = base
        self.console = console
        self.signals = signals
        self.layout = Layout(())
        self.records = state.Records(base, "destination")
        self.id = walk.header.stream_id.hex()
        self.answered = walk.header.form == Form.ANSWERED
        self.reply = Reply(base, self.id) if self.answered else None
        self.machine = Machine(handshake.DESTINATION, There.BUILDING, self._do)
        self.sink: Sink | None = None
        self.lock: state.Lock | None = None
        self.stream_lock: state.Lock | None = None
        self.targets: Sequence[Target] = ()
        self.states: list[State] = []
        self.name = ""
        self.operand = ""
        self.why = ""
        self.nonce = b""
        self.accepted = False
        self.recorded = False
        self.let_go = False

    def run(self) -> None:
        """Build and start the guest.  Raises BhyError; then call undo()."""
        if self.reply:
            self.reply.hello()
            self.source.on_quiet = self.reply.hello
        # Held to the end: a second bhyrecv of the same stream is refused now,
        # and finds the record later.
        self.stream_lock = leftover.lock_stream(self.base, self.id)
        if self.walk.is_dry_run:
            raise UsageError("the stream is a dry run (bhysend -n): read it with bhyrecv -n")
        require_startable(self.opts, self.walk, self.records)
        events = self.walk.events()
        while not self.let_go:
            # Reading may be interrupted; acting on what was read may not.
            with self.signals.interruptible():
                event = next(events, None)
            if event is None:
                raise GuestError("the source gave up: the stream ends without GO")
            self.take(event)
            if self.reply and not self.let_go:
                self.seen(now=isinstance(event, Head | RoundEnd | Pad))

    def take(self, event: VerifiedEvent) -> None:
        """Act on what has been read and verified."""
        match event:
            case Head():
                self.prepare(event)
            case Rehearsal():
                self.open(event.plan)
            case Pages():
                self.write_pages(event)
            case RoundEnd():
                self.say_round(event)
            case State():
                self.states.append(event)
            case Ended():
                self.ended = event
                self.ended_ns = time.monotonic_ns()
                self.finish()
            case Go():
                self.go(event)

    def seen(self, *, now: bool) -> None:
        """Answer how far the stream is read."""
        assert self.reply is not None
        reader = self.walk.reader
        self.reply.seen(reader.sequence - 1, reader.offset_bytes, now=now)

    def prepare(self, head: Head) -> None:
        """Give the verdict."""
        kind = head.host["hypervisor"]
        self.sink, self.name, self.operand = hypervisors.open_sink(
            kind, head.config["name"], self.opts.receiving(self.base, self.walk)
        )
        if contents := hypervisors.open_contents(kind):
            self.walk.understand(contents, head)
        self.lock = state.Lock(self.base, f"to-{self.operand}", f"guest {self.name}")
        if self.opts.directory is None:
            leftover.sweep(self.base, self.records, f"to-{self.operand}")
        refuse(self.opts.reasons(self.sink, head), self.name)
        self.console.log(f"guest {self.name}: stream {self.id} begins")
        self.layout = head.layout
        self.progress = Progress(
            self.console,
            self.name,
            self.layout.npages,
            verbose=self.opts.verbose,
            machine=self.opts.machine,
        )
        self.signals.on_report = self.progress.report
        if self.reply:
            self.source.on_quiet = None
            self.sink.on_wait = lambda: self.seen(now=False)
            self.reply.say("ACCEPT")
            self.accepted = True

    def open(self, plan: bytes) -> None:
        """Make the empty guest: early, where a rehearsal tells how."""
        assert self.sink is not None
        late = self.opts.unstarted or self.walk.header.form == Form.KEPT
        self.targets = self.sink.open(b"" if late else plan)

    def write_pages(self, event: Pages) -> None:
        """Put pages where they belong."""
        if not self.targets:
            self.open(b"")
        base = self.layout.starts[event.segment]
        npages = self.layout.segments[event.segment].npages
        try:
            self.targets[event.segment].place(base, npages, event.extents, event.pages)
        except OSError as error:
            raise from_oserror(error, f"write the memory of guest {self.name}") from error
        self.report_pages(event)

    def report_pages(self, event: Pages) -> None:
        """Show progress: how far this round has come, and what it brought."""
        first, count, _ = fmt.EXTENT.unpack_from(
            event.extents, len(event.extents) - fmt.EXTENT.size
        )
        self.progress.done_pages = first + count
        self.progress.sent_pages += len(event.pages) // PAGE_BYTES
        self.progress.sent_bytes = self.walk.reader.offset_bytes
        if not self.progress.round:  # which states every page; later ones what has changed
            self.progress.work_done, self.progress.work_total = first + count, self.progress.npages
        self.progress.tick()

    def say_round(self, event: RoundEnd) -> None:
        """Report a round, with -v; see that the guest that is built is still there."""
        if self.sink:
            self.sink.require_alive()
        self.progress.enter("round", event.round + 1)
        self.progress.work_total = 0
        if self.opts.verbose:
            self.console.say(
                f"guest {self.name}: round {event.round}: {event.data_pages} pages, "
                f"{event.zero_pages} zero"
            )

    def finish(self) -> None:
        """Load the state.  Plain form: record the start; start.  The stream has verified."""
        assert self.sink is not None
        if self.reply:
            self.seen(now=True)
        if not self.targets:  # a guest that never wrote a page
            self.open(b"")
        self.sink.load(self.states)
        self.states.clear()
        if self.opts.directory is not None:
            self.sink.start()
            self.let_go = True
            self.say_end()
            return
        self.record = state.Record(
            id=self.id,
            guest=self.name,
            operand=self.operand,
            lock=f"to-{self.operand}",
            phase=READY,
            revive=dict(self.sink.record()),
        )
        if self.answered:
            self.machine.on(Event.ENDED)
            self.source.deadline = time.monotonic() + GO_SECONDS
            self.source.why = f"no GO came for {GO_SECONDS} s"
            return
        phase = LOADED if self.opts.unstarted else STARTED
        self._record(phase)
        if self.opts.unstarted:
            self.sink.leave_paused()
        else:
            self.sink.start()
        self.let_go = True
        self.say_end()

    def go(self, event: Go) -> None:
        """Start the guest, if it is our READY that is answered."""
        if not secrets.compare_digest(event.nonce, self.nonce):
            where = self.walk.place(Type.GO)
            raise IncompatibleError(f"{where}: GO has another nonce: it is not the answer to READY")
        self.machine.on(Event.GO)
        self.let_go = True
        self.machine.on(Event.STARTED)
        self.say_end()

    def say_end(self) -> None:
        """Say where the guest is now, and how long it stood still."""
        event = self.ended
        what = "loaded, paused" if self.opts.unstarted else "it runs here"
        if self.opts.directory is not None:
            what = f"its snapshot files are made: {self.operand}"
        text = (
            f"guest {self.name}: {what}; {counted(event.end.rounds, 'round')}, "
            f"{size(self.walk.reader.offset_bytes)}"
        )
        here_ns = time.monotonic_ns() - self.ended_ns
        is_moved = self.walk.header.form != Form.KEPT and self.opts.directory is None
        if is_moved and event.time and event.time.paused_for_ns:
            total = event.time.paused_for_ns + here_ns
            text += f"; paused {duration(total)} and the way of END, {duration(here_ns)} of it here"
        self.console.say(text)
        self.console.log(text)
        for notice in self.sink.notices if self.sink else ():
            self.console.say(f"guest {self.name}: {notice}")
        if self.opts.unstarted:
            self.console.say(f"let it run: bhyrecv --resume {self.name}")
            self.console.say(f"or end it: bhyrecv --discard {self.name}")

    def undo(self, error: BhyError) -> BhyError:
        """Leave the host as it was found, and say so with the error.

        A guest that may have run is left alone, and its record with it: only
        the operator can see whether it runs, and ending it could end the only
        copy that has gone on.  Returns the error to raise.
        """
        self.why = str(error)
        if self.sink and self.sink.may_have_run:
            if self.answered:
                self.machine.on(Event.MAY_HAVE_RAN)
            return InDoubtError(
                f"guest {self.name}: it may run here: {error}",
                f"look at {self.operand}; until you know, keep the source held",
            )
        if self.answered:
            starting = self.machine.at == There.STARTING
            self.machine.on(Event.NEVER_RAN if starting else Event.FAILURE)
        else:
            self._tear_down()
            if self.recorded:
                self.records.remove(self.id)
        error.hint = f"nothing was started here\n{error.hint}"
        return error

    def close(self) -> None:
        """Give up the locks, and make what is kept of earlier streams smaller."""
        for lock in (self.lock, self.stream_lock):
            if lock:
                lock.release()
        prune.prune(self.base, self.records)

    # The acts of handshake.DESTINATION.

    def _do(self, act: Act) -> None:
        assert self.reply is not None
        acts: dict[Act, Callable[[], None]] = {
            Act.RECORD_READY: lambda: self._record(READY),
            Act.RECORD_STARTED: self._record_started,
            Act.RECORD_DEAD: self._record_dead,
            Act.START: self._start,
            Act.TEAR_DOWN: self._tear_down,
            Act.SAY_READY: self._say_ready,
            Act.SAY_RUNNING: lambda: self._try_to_say("RUNNING"),
            Act.SAY_FAILED: self._say_failed,
            Act.SAY_RAN: lambda: self._try_to_say("RAN"),
        }
        acts[act]()

    def _record(self, phase: str) -> None:
        self.recorded = True  # it may be there, also where that fails
        self.records.write(self.record.moved(phase))

    def _record_started(self) -> None:
        if not self.records.change(self.id, READY, STARTED):
            raise IncompatibleError("GO came too late: the stream was given up here (bhyrecv -q)")

    def _record_dead(self) -> None:
        # READY is as good without us: nobody else has the guest, or the nonce.
        with contextlib.suppress(BhyError):
            for before in (READY, STARTED):
                self.records.change(self.id, before, DEAD)

    def _start(self) -> None:
        assert self.sink is not None
        self.sink.start()

    def _tear_down(self) -> None:
        if self.sink:
            self.sink.abort()

    def _say_ready(self) -> None:
        assert self.reply is not None
        self.nonce = secrets.token_bytes(fmt.NONCE_BYTES)
        self.reply.say("READY", self.nonce.hex())

    def _say_failed(self) -> None:
        self._try_to_say("FAILED" if self.accepted else "REFUSED", self.why)

    def _try_to_say(self, word: str, *args: str) -> None:
        assert self.reply is not None
        self.reply.try_to_say(word, *args)


def require_startable(opts: Options, walk: Walk, records: state.Records) -> None:
    """Refuse a stream that may not be started here, whatever is in it.  Raises IncompatibleError.

    records: of this destination.
    """
    is_answered = walk.header.form == Form.ANSWERED
    if is_answered:
        opts.refuse_answered()
    if opts.directory is not None:
        return  # files start nothing, and may be made of a stream again
    id_ = walk.header.stream_id.hex()
    record = records.get(id_)
    if record and record.phase == LOADED and hold.is_alive(record):
        raise IncompatibleError(
            f"stream {id_} stands loaded on this host, as {record.operand}",
            f"bhyrecv --resume {id_}, or bhyrecv --discard {id_}",
        )
    phase = records.phase(id_)
    if phase and (is_answered or not opts.again):
        where = f", as {record.operand}" if record else ""
        raise IncompatibleError(
            f"stream {id_} was {phase} on this host before{where}",
            "" if is_answered else "if no copy of that guest runs anywhere: --again",
        )


def refuse(reasons: Sequence[str], name: str) -> None:
    """Raise IncompatibleError if there are reasons against the guest."""
    if reasons:
        raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))
