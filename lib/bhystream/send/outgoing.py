"""One move at the source, from beginning to end.

Outgoing.run() is one flat list of steps:

    begin     the head, and the destination's verdict              Begun
    prepare   what the pause needs, while the guest runs
    rounds    the memory, while the guest runs                     rounds.py
    pause     the keeper watches; the guest is paused from here    custody.py
    rest      the last pages, with --verify the hashes; the state, the -p command
    ending    END, and in the answered form GO: one step for each form

main.py owns the source and the guest's lock, Outgoing owns the route, and Custody
owns the keeper, the -p command and the record.  No step cleans up after itself: the
caller calls recover().  What a failure means for the guest depends on how far the
move has come, and not on what has failed: Custody.recover(), by handshake.SOURCE.
"""

from __future__ import annotations

import time
from dataclasses import replace

from bhystream import commandline
from bhystream.backend.base import Prepared
from bhystream.errors import EXIT_HELD, EXIT_OK, BhyError, GuestEndedError, GuestError
from bhystream.guest import PAUSED, Head
from bhystream.handover.handshake import Event
from bhystream.handover.recorded import asking
from bhystream.handover.state import Record, Told
from bhystream.handover.where import Where, what_to_type
from bhystream.report import Progress
from bhystream.send.conversation import Conversation, Route
from bhystream.send.custody import Custody, Recovered
from bhystream.send.head import new_header, write_head
from bhystream.send.job import Begun, SendJob
from bhystream.send.rounds import STALL_SECONDS, Rounds
from bhystream.send.sampling import Sampler
from bhystream.send.stopwatch import Stopwatch
from bhystream.stream import format as fmt
from bhystream.stream.format import Form, Header, Type
from bhystream.stream.writer import Writer
from bhystream.urgent import urgently

_STDOUT = 1


class Outgoing:
    """One move of one guest into a pipe."""

    def __init__(self, job: SendJob) -> None:
        """Open nothing yet.  job stays the caller's."""
        self._job = job
        self._watch = Stopwatch()
        # How far the move has come, for recover().
        self._route: Route | None = None
        self._writer: Writer | None = None
        self._custody: Custody | None = None
        self._sampler: Sampler | None = None

    def run(self) -> int:
        """Send the guest; return the exit status: 0, or EXIT_HELD in the plain form.

        On any exception the caller must call recover(), and in any case then close().
        Raises whatever ends the move, usually a BhyError.
        """
        job, signals = self._job, self._job.signals
        head = job.source.head()
        progress = Progress(
            job.console,
            job.source.name,
            head.layout.npages,
            verbose=job.opts.verbose,
            machine=job.opts.machine,
        )
        signals.on_report = progress.report
        header = new_header(job.opts.form, job.opts.features)
        if header.form == Form.ANSWERED:
            self._route = self._open_route(header.stream_id.hex())
        with signals.interruptible():
            begun = self._begin(header, head)
            prepared = self._prepare(begun)
            record = self._record(begun, prepared)
            self._sampler = Sampler(job.source.disks(), header.seed, job.say)
            rounds = Rounds(job, head, begun, progress, self._watch, prepared)
        # Between the blocks that a signal ends, a signal is told what happens next.
        signals.on_deferred = lambda name: job.say(
            f"{name}: giving up; the guest runs on here as soon as its hypervisor has answered"
        )
        # A keeper watches from here on: if bhysend dies, the keeper acts on the record.
        custody = self._custody = Custody(job, begun, record, self._watch)
        rounds.precopy(custody.throttle)
        # The guest is paused from here on; until END or GO is out, recover() resumes it.
        custody.pause()
        progress.enter("paused, round", rounds.live)
        with signals.watching(rounds.done, STALL_SECONDS):
            rounds.last()
            self._say_reasons(custody)
        if job.opts.keep:
            sampled = self._end_hook(custody)
            custody.release()
            progress.enter("runs again, round", rounds.live)
        with signals.watching(rounds.done, STALL_SECONDS):
            self._write_states(begun.writer, custody)
        if not job.opts.keep:
            sampled = self._end_hook(custody)
        with signals.watching(rounds.done, STALL_SECONDS):
            self._write_time(begun.writer)
            if sampled:
                begun.writer.section(Type.DISKS, sampled)
        if begun.talk:
            return self._hand_over(begun, begun.talk, custody, rounds)
        return self._finish(begun, custody, rounds)

    def recover(self, error: BhyError) -> BhyError:
        """Do what a failure means for the guest; return the error, with where the guest is.

        The guest comes first, then ABORT for the destination, then the reason of a break.
        """
        # Without Custody the guest was never paused.  GuestEndedError needs no such line.
        ended = isinstance(error, GuestEndedError)
        recovered = Recovered("" if ended else f"{self._job.who}: it runs here")
        if self._custody:
            recovered = self._custody.recover(error)
        if self._writer:
            self._writer.abort(error.status, str(error))
        if recovered.instead:
            return recovered.instead
        if self._route:
            # explain() may wait for seconds, so call it only after the guest is back.
            error = self._route.explain(error)
        error.hint = f"{recovered.where}\n{error.hint}"
        return error

    def close(self, status: int) -> None:
        """Release what run() has opened; the third stage of the answered forms gets this status.

        job.source stays the caller's.  May be called twice.
        """
        if self._custody:
            self._custody.close()
        if self._route:
            self._route.close(status)
        if self._sampler:
            self._sampler.close()

    def _open_route(self, id_: str) -> Route:
        """Open the way there and the way back.

        Not interruptible: a signal that raised in between would leave the command behind.
        """
        job, opts = self._job, self._job.opts
        names = (job.source.name, opts.guest)
        return Route(job.console, job.signals, job.base, names, id_, opts.command, opts.umask)

    def _begin(self, header: Header, head: Head) -> Begun:
        """Write the head; in the answered forms, wait until the destination has accepted it."""
        job = self._job
        fd = self._route.stream_fd if self._route else _STDOUT
        commandline.widen_pipe(fd)
        writer = self._writer = Writer(fd, header)
        write_head(writer, head)
        job.log(f"stream {header.stream_id.hex()} begins")
        if self._route is None:
            return Begun(writer, None)
        talk = Conversation(self._route, writer, job.console, job.signals)
        talk.await_accept()
        job.log(f"{talk.host} can take it")
        return Begun(writer, talk)

    def _prepare(self, begun: Begun) -> Prepared:
        """Have the backend check that the guest can be paused; say what the operator has to know.

        Called only after the destination's verdict, because a refused move must leave the
        guest alone.  By the plan a destination may start its hypervisor early.  The plan is
        b"" with -p, because the disks then come only with the pause, and for a kept stream,
        which the operator starts later.  source.close() undoes prepare() if the guest is
        never paused.
        """
        job, opts = self._job, self._job.opts
        prepared = job.source.prepare(begun.id)
        told = Told(job.base, job.source.lock_name)
        for warning in told.new(job.source.warnings(), everything=opts.verbose):
            job.say(warning)
        return replace(prepared, plan=b"") if opts.hook is not None or opts.keep else prepared

    def _record(self, begun: Begun, prepared: Prepared) -> Record:
        """Return the record from which the keeper finds the guest, which is not written yet."""
        return Record(
            id=begun.id,
            guest=self._job.source.name,
            operand=self._job.opts.guest,
            lock=self._job.source.lock_name,
            phase=PAUSED,
            revive=dict(prepared.record),
            ask=tuple(asking(self._job.opts.command)),
        )

    def _say_reasons(self, custody: Custody) -> None:
        """Say which parts of the guest the state lacks, and why."""
        self._job.console.clear()  # the destination often writes to the same terminal
        for reason in custody.reasons:
            self._job.say(reason)

    def _write_states(self, writer: Writer, custody: Custody) -> None:
        """Write the state sections: the guest is paused, or if kept runs again."""
        watch, start_ns = self._watch, time.monotonic_ns()
        for state in custody.states:
            writer.state(state)
        if not self._job.opts.keep:
            watch.note(last_ns=watch.measured.last_ns + time.monotonic_ns() - start_ns)

    def _write_time(self, writer: Writer) -> None:
        """Write TIME, behind everything that can take long in the pause."""
        watch = self._watch
        paused_for_ns = watch.pause_ns if self._job.opts.keep else watch.elapsed_ns()
        writer.section(Type.TIME, fmt.TIME.pack(watch.paused_at_ns, paused_for_ns))

    def _end_hook(self, custody: Custody) -> bytes:
        """Wait for the -p command, and sample the disks; return the payload of DISKS, or b""."""
        with self._job.signals.interruptible():
            custody.wait_for_hook()
        watch, start_ns = self._watch, time.monotonic_ns()
        sampled = self._sampler.take() if self._sampler else b""
        watch.note(last_ns=watch.measured.last_ns + time.monotonic_ns() - start_ns)
        return sampled

    def _finish(self, begun: Begun, custody: Custody, rounds: Rounds) -> int:
        """Write END in the forms without answers; return the exit status.

        Plain form: hold() records HELD before END, and the operator decides from then on.
        Kept form: the guest runs again already, so a failure costs only the stream.
        """
        keep = self._job.opts.keep
        console, name = self._job.console, self._job.source.name
        with self._job.signals.interruptible():
            custody.await_room()
            # A full disk fails here, before END, while recover() can still resume the guest.
            begun.writer.sync()
        self._job.signals.on_deferred = lambda signal: console.say(
            f"{signal}: too late, END is on its way; waiting until it is written"
        )
        if keep:
            begun.writer.end()
            begun.writer.sync()
        else:
            custody.hold()
        self._job.signals.forget()
        self._say_end("kept, it runs on here" if keep else "held here", begun, rounds)
        if keep:
            return EXIT_OK
        for line in what_to_type(Where.HELD, custody.record, self._job.base, name).splitlines():
            console.say(line)
        return EXIT_HELD

    def _hand_over(self, begun: Begun, talk: Conversation, custody: Custody, rounds: Rounds) -> int:
        """Write END; after READY write GO; after RUNNING end the guest here; return 0.

        Raises GuestError after FAILED, when the guest runs here again, and InDoubtError if
        the answer to GO leaves doubt: the guest then stays paused, and its record in GO.
        """
        start_ns = time.monotonic_ns()
        with urgently(talk.route.thread_id):
            event, why = self._await_outcome(talk, custody, rounds)
        self._watch.stop()
        self._watch.note(answers_ns=time.monotonic_ns() - start_ns)
        try:
            custody.settle(event, f"{talk.host}: {why}")
        except GuestEndedError as gone:
            raise GuestEndedError(f"{talk.host}: {why}; and here: {gone}") from gone
        self._job.signals.forget()
        if event == Event.FAILED:
            raise GuestError(f"{talk.host}: {why}")
        if event == Event.DOUBT:
            raise custody.doubt(f"it was to start on {talk.host}, and {why}")
        self._say_end(f"it runs on {talk.host}, and is gone here", begun, rounds)
        return EXIT_OK

    def _await_outcome(
        self, talk: Conversation, custody: Custody, rounds: Rounds
    ) -> tuple[Event, str]:
        """Write END, and after READY GO; return what the answer to GO means, and its reason."""
        talk.refuse_early_ready()
        custody.require_paused()
        # END starts nothing here: until GO any failure or signal resumes the guest.
        with self._job.signals.interruptible():
            custody.await_room()
            custody.offer()
            ready = talk.await_ready(rounds.memory_bytes)
            custody.await_room()
        try:
            custody.require_paused()
        except GuestEndedError as gone:
            # The destination's copy is the only one now, so the move goes on.
            self._job.console.say(f"{gone}; {talk.host} has all of the guest, so it goes on there")
        # commit() comes first, so that a signal right after GO is told that it is too late.
        talk.commit()
        # From here on only the answer decides, unless GO is not written whole.
        custody.go(ready)
        return talk.await_outcome()

    def _say_end(self, what: str, begun: Begun, rounds: Rounds) -> None:
        is_answered = begun.talk is not None
        has_hook = self._job.opts.hook is not None
        if rounds.throttled:
            what += f"; {rounds.throttled}"
        line = self._watch.line(what, begun.writer, is_answered=is_answered, has_hook=has_hook)
        self._job.say(line)
        self._job.log(line)
        rounds.learn()
