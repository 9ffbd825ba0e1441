"""What is done with a guest at the destination, and answered: the acts of handshake.DESTINATION.

In the forms without answers the record and the end of what was made are all
that there is to do; the machine stays where it begins.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable

from bhystream.backend.base import Sink
from bhystream.errors import BhyError, IncompatibleError
from bhystream.guest import DEAD, READY, STARTED
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, Event, Machine, There
from bhystream.handover.state import Record
from bhystream.recv.receiving import Job
from bhystream.stream import format as fmt


class Arrival:
    """One guest, as far as it was recorded and answered for."""

    def __init__(self, job: Job) -> None:
        """Nothing is made or recorded, and HELLO is all that was answered."""
        self._job = job
        self._machine = Machine(handshake.DESTINATION, There.BUILDING, self._do)
        self._is_accepted = False
        self._is_recorded = False
        self._why = ""
        self._nonce = secrets.token_bytes(fmt.NONCE_BYTES)
        # The head and END add what they make possible.
        self._acts: dict[Act, Callable[[], None]] = {
            Act.RECORD_STARTED: self._record_started,
            Act.RECORD_DEAD: self._record_dead,
            Act.TEAR_DOWN: lambda: None,
            Act.SAY_READY: lambda: job.reply.say("READY", self._nonce.hex()),
            Act.SAY_RUNNING: lambda: job.reply.try_to_say("RUNNING"),
            Act.SAY_FAILED: self._say_failed,
            Act.SAY_RAN: lambda: job.reply.try_to_say("RAN"),
        }

    def take(self, sink: Sink) -> None:
        """Take the guest that this sink makes, which stays the caller's."""
        self._acts[Act.TEAR_DOWN] = sink.abort
        self._acts[Act.START] = sink.start

    def accept(self) -> None:
        """Answer ACCEPT.  Raises PipeError."""
        self._job.reply.say("ACCEPT")
        self._is_accepted = True

    def record(self, record: Record, phase: str) -> None:
        """Write the record.  Raises AccessError, PipeError; it may be there all the same."""
        self._is_recorded = True
        self._job.records.write(record.moved(phase))

    def ready(self, record: Record) -> bytes:
        """Record READY, and answer it; return the nonce that GO has to have."""
        self._acts[Act.RECORD_READY] = lambda: self.record(record, READY)
        self._machine.on(Event.ENDED)
        return self._nonce

    def go(self) -> None:
        """Record STARTED, and start the guest.  Raises BhyError; then call fail()."""
        self._machine.on(Event.GO)

    def say_running(self) -> None:
        """Answer RUNNING, where the source waits for an answer."""
        if self._job.is_answered:
            self._machine.on(Event.STARTED)

    def may_have_run(self) -> None:
        """Answer that nobody knows whether the guest ran."""
        if self._job.is_answered:
            self._machine.on(Event.MAY_HAVE_RAN)

    def fail(self, why: str) -> str:
        """Undo what was made and recorded, and answer why.  The guest never ran.

        Returns what could not be undone, "" if all was.
        """
        self._why = why
        if self._job.is_answered:
            is_starting = self._machine.at == There.STARTING
            self._machine.on(Event.NEVER_RAN if is_starting else Event.FAILURE)
            return ""
        self._do(Act.TEAR_DOWN)
        try:
            if self._is_recorded:
                self._job.records.remove(self._job.id)
        except BhyError as error:
            return f"its record stays, and says that it was started: {error}"
        return ""

    def _do(self, act: Act) -> None:
        self._acts[act]()

    def _record_started(self) -> None:
        records = self._job.records
        if not records.change(self._job.id, READY, STARTED):
            raise IncompatibleError("GO came too late: the stream was given up here (bhyrecv -q)")

    def _record_dead(self) -> None:
        # READY is as good without us: nobody else has the guest, or the nonce.
        with contextlib.suppress(BhyError):
            for before in (READY, STARTED):
                self._job.records.change(self._job.id, before, DEAD)

    def _say_failed(self) -> None:
        word = "FAILED" if self._is_accepted else "REFUSED"
        self._job.reply.try_to_say(word, self._why)
