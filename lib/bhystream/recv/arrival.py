"""The acts of handshake.DESTINATION: what is done, recorded and answered about a guest.

The forms without answers need only the record, and the end of a guest that was
built; the machine then stays in its first state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from bhystream.backend.base import Sink
from bhystream.errors import BhyError, IncompatibleError
from bhystream.guest import DEAD, READY, STARTED
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, DestinationState, Event, Machine
from bhystream.handover.state import Record
from bhystream.recv.receiving import RecvJob
from bhystream.stream import format as fmt


class Arrival:
    """The record of one guest, and the answers about it."""

    def __init__(self, job: RecvJob) -> None:
        """Begin with nothing built or recorded, and with HELLO answered."""
        self._job = job
        self._machine = Machine(handshake.DESTINATION, DestinationState.BUILDING, self._do)
        self._is_accepted = False
        self._is_recorded = False
        self._why = ""
        self._nonce = os.urandom(fmt.NONCE_BYTES)
        # take(), ready() and go() add the acts that they make possible.
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
        """Let the acts end the guest of this sink, which stays the caller's."""
        self._acts[Act.TEAR_DOWN] = sink.abort

    def accept(self) -> None:
        """Answer ACCEPT.  Raises InputOutputError."""
        self._job.reply.say("ACCEPT")
        self._is_accepted = True

    def record(self, record: Record, phase: str) -> None:
        """Write the record.  Raises AccessError, InputOutputError; it may be there even then."""
        self._is_recorded = True
        self._job.records.write(record.with_phase(phase))

    def ready(self, record: Record) -> bytes:
        """Record READY, and answer it; return the nonce that GO has to have.

        Raises AccessError, InputOutputError.
        """
        self._acts[Act.RECORD_READY] = lambda: self.record(record, READY)
        self._machine.on(Event.ENDED)
        return self._nonce

    def go(self, start: Callable[[], None]) -> None:
        """Record STARTED, and start the guest.

        Raises BhyError; the caller then calls fail(), or may_have_run().
        """
        self._acts[Act.START] = start
        self._machine.on(Event.GO)

    def say_running(self) -> None:
        """Answer RUNNING if the source waits for an answer."""
        if self._job.is_answered:
            self._machine.on(Event.STARTED)

    def may_have_run(self) -> None:
        """Answer RAN if the source waits for an answer: the guest may have run."""
        if self._job.is_answered:
            self._machine.on(Event.MAY_HAVE_RAN)

    def fail(self, why: str) -> str:
        """Undo what was made and recorded, and answer why.  The guest never ran.

        Returns what could not be undone, "" if everything was undone.
        """
        self._why = why
        if self._job.is_answered:
            is_starting = self._machine.at == DestinationState.STARTING
            self._machine.on(Event.NEVER_RAN if is_starting else Event.FAILURE)
            return ""
        self._do(Act.TEAR_DOWN)
        try:
            if self._is_recorded:
                self._job.records.remove(self._job.id)
        except BhyError as error:
            return f"the record stays, and says that the guest was started: {error}"
        return ""

    def _do(self, act: Act) -> None:
        self._acts[act]()

    def _record_started(self) -> None:
        records = self._job.records
        if not records.change(self._job.id, READY, STARTED):
            raise IncompatibleError("GO came too late: the stream was given up here (bhyrecv -q)")

    def _record_dead(self) -> None:
        # A record that stays READY is as good: no other process has the guest, or the nonce.
        with contextlib.suppress(BhyError):
            for before in (READY, STARTED):
                self._job.records.change(self._job.id, before, DEAD)

    def _say_failed(self) -> None:
        word = "FAILED" if self._is_accepted else "REFUSED"
        self._job.reply.try_to_say(word, self._why)
