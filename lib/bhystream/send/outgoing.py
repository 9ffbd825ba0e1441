"""One move at the source, from beginning to end.

It is one flat list of steps, in Outgoing.run():

    begin     the head, and the destination's verdict              Begun
    prepare   what the pause needs, while the guest runs
    rounds    the memory, while the guest runs                     rounds.py
    pause     the keeper watches; the guest stands from here on    custody.py
    rest      the last pages, the state, the -p command
    ending    END, and in the answered form GO: one for each form

What a failure means for the guest depends on how far the move has come, not on
what failed: Custody.recover(), by handshake.SOURCE.
"""

from __future__ import annotations

import secrets
import time

from bhystream import commandline
from bhystream.errors import HELD, OK, BhyError, GoneError, GuestError
from bhystream.guest import PAUSED, Head
from bhystream.handover.handshake import Event
from bhystream.handover.standing import asking
from bhystream.handover.state import Record, Told
from bhystream.handover.where import Where, what_to_type
from bhystream.report import Progress
from bhystream.send.conversation import Conversation, Route
from bhystream.send.custody import Custody
from bhystream.send.job import Begun, Job
from bhystream.send.rounds import STALL_SECONDS, Rounds
from bhystream.send.stopwatch import Stopwatch
from bhystream.send.transfer import write_head
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.writer import Writer
from bhystream.units import NS

_STDOUT = 1


class Outgoing:
    """One guest, sent to a pipe."""

    def __init__(self, job: Job) -> None:
        """Nothing is opened yet."""
        self._job = job
        self._watch = Stopwatch()
        # How far it has come, for recover().
        self._route: Route | None = None
        self._writer: Writer | None = None
        self._custody: Custody | None = None

    def run(self) -> int:
        """Send the guest; return the exit status.

        The caller calls recover() on any exception, and close() in the end.
        Raises BhyError.
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
        stream_id = secrets.token_bytes(fmt.STREAM_ID_BYTES)
        if job.opts.form == Form.ANSWERED:
            self._route = self._open_route(stream_id.hex())
        with signals.interruptible():
            begun = self._begin(stream_id, head)
            record, plan = self._prepare(begun)
            rounds = Rounds(job, head, begun, progress, self._watch)
        custody = self._custody = Custody(job, begun, record, self._watch)
        deadline_s = time.monotonic() + job.opts.limits.time_ns / NS
        with signals.until(deadline_s, rounds.out_of_time):
            rounds.precopy(plan)
        custody.pause()
        progress.enter("paused, round", rounds.live)
        with signals.watching(rounds.done, STALL_SECONDS):
            rounds.last()
            self._say_reasons(custody)
        if job.opts.keep:
            with signals.interruptible():
                custody.wait_for_hook()
            custody.release()
            progress.enter("runs again, round", rounds.live)
        with signals.watching(rounds.done, STALL_SECONDS):
            self._write_state(begun.writer, custody)
        with signals.interruptible():
            custody.wait_for_hook()
        if begun.talk:
            return self._hand_over(begun, begun.talk, custody, rounds)
        return self._finish(begun, custody, rounds)

    def recover(self, error: BhyError) -> BhyError:
        """Do what a failure means for the guest; return the error, with where the guest is."""
        # One that has ended says so itself.
        where = "" if isinstance(error, GoneError) else f"{self._job.who}: it runs here"
        if self._custody:
            try:
                where = self._custody.recover(error)
            except BhyError as final:
                return final
        if self._writer:
            self._writer.abort(error.status, str(error))
        if self._route:
            # Only now: the guest does not wait for it.
            error = self._route.explain(error)
        error.hint = f"{where}\n{error.hint}"
        return error

    def close(self, status: int) -> None:
        """End the conversation, in the answered forms, with this exit status."""
        if self._route:
            self._route.close(status)

    def _open_route(self, id_: str) -> Route:
        """Open the way there and back.  A signal waits, or it would leave the command behind."""
        job, opts = self._job, self._job.opts
        names = (job.source.name, opts.guest)
        return Route(job.console, job.base, names, id_, opts.command, opts.umask)

    def _begin(self, stream_id: bytes, head: Head) -> Begun:
        """Write the head, and wait until the destination has accepted it."""
        job, opts = self._job, self._job.opts
        fd = self._route.stream_fd if self._route else _STDOUT
        commandline.widen_pipe(fd)
        features = Feature.ZSTD if opts.level is not None else Feature(0)
        header = Header(opts.form, features, stream_id, secrets.randbits(64))
        writer = self._writer = Writer(fd, header)
        write_head(writer, head)
        job.log(f"stream {stream_id.hex()} begins")
        if self._route is None:
            return Begun(writer, None)
        talk = Conversation(self._route, writer, job.console, job.signals)
        talk.await_accept()
        job.log(f"{talk.host} can take it")
        return Begun(writer, talk)

    def _prepare(self, begun: Begun) -> tuple[Record, bytes]:
        """Let the backend see that the guest can be paused; know how it is found again.

        Not before the destination's verdict: a move that is refused leaves the
        guest alone.  Returns the record, and the plan by which a destination
        may start early: none for one whose disks come with the pause (-p), and
        for a kept stream, which is started when somebody wants it.
        """
        job, opts = self._job, self._job.opts
        prepared = job.source.prepare(begun.id)
        record = Record(
            id=begun.id,
            guest=job.source.name,
            operand=opts.guest,
            lock=job.source.lock_name,
            phase=PAUSED,
            revive=dict(prepared.record),
            ask=asking(opts.command),
        )
        told = Told(job.base, job.source.lock_name)
        for warning in told.new(job.source.warnings(), everything=opts.verbose):
            job.say(warning)
        return record, prepared.plan if opts.hook is None and not opts.keep else b""

    def _say_reasons(self, custody: Custody) -> None:
        """Say what of the guest the state does not have."""
        self._job.console.clear()  # the destination's lines often come to the same terminal
        for reason in custody.reasons:
            self._job.say(reason)

    def _write_state(self, writer: Writer, custody: Custody) -> None:
        """Write the state sections and the time."""
        for state in custody.states:
            writer.state(state)
        watch = self._watch
        paused_for_ns = watch.pause_ns if self._job.opts.keep else watch.elapsed_ns()
        writer.section(Type.TIME, fmt.TIME.pack(watch.paused_at_ns, paused_for_ns))

    def _finish(self, begun: Begun, custody: Custody, rounds: Rounds) -> int:
        """Write END, in the forms without answers: the guest is held here, or runs again."""
        keep = self._job.opts.keep
        console, name = self._job.console, self._job.source.name
        self._job.signals.on_deferred = lambda signal: console.say(
            f"{signal}: too late, END is on its way; waiting until it is written"
        )
        begun.writer.sync()
        if keep:
            begun.writer.end()
        else:
            custody.hold()
        begun.writer.sync()
        custody.dismiss_keeper()
        self._job.signals.forget()
        self._say_end("kept, it runs on here" if keep else "held here", begun, rounds)
        if keep:
            return OK
        for line in what_to_type(Where.HELD, custody.record, self._job.base, name).splitlines():
            console.say(line)
        return HELD

    def _hand_over(self, begun: Begun, talk: Conversation, custody: Custody, rounds: Rounds) -> int:
        """Write END; on READY write GO; on RUNNING end the guest here.

        Returns 0, or raises what the answer to GO means for the guest.
        """
        start_ns = time.monotonic_ns()
        talk.refuse_early_ready()
        custody.require_paused()
        with self._job.signals.interruptible():
            custody.offer()
            ready = talk.await_ready(rounds.memory_bytes)
        try:
            custody.require_paused()
        except GoneError as gone:
            # What waits there is the only copy now.
            self._job.console.say(f"{gone}; {talk.host} has all of it, so it goes on there")
        # Before GO: a signal that comes right behind it is told so too.
        talk.commit()
        custody.go(ready)
        event, why = talk.await_outcome()
        self._watch.stop()
        self._watch.answers_ns = time.monotonic_ns() - start_ns
        try:
            custody.settle(event)
        except GoneError as gone:
            raise GoneError(f"{talk.host}: {why}; and here: {gone}") from gone
        custody.dismiss_keeper()
        self._job.signals.forget()
        if event == Event.FAILED:
            raise GuestError(f"{talk.host}: {why}")
        if event == Event.DOUBT:
            raise custody.doubt(f"it was to start on {talk.host}, and {why}")
        self._say_end(f"it runs on {talk.host}, and is gone here", begun, rounds)
        return OK

    def _say_end(self, what: str, begun: Begun, rounds: Rounds) -> None:
        is_answered = begun.talk is not None
        line = self._watch.line(
            what, begun.writer, is_answered=is_answered, is_predicted=rounds.live > 0
        )
        self._job.say(line)
        self._job.log(line)
