"""What `bhysend -A` does if no bhysend lives any more: settle the move by its record.

The answers say what became of the guest at the destination, the record says what
may be done here, and handshake.RECORD combines the two.  The exit status says
where the guest is, whatever fails on the way.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from bhystream.errors import (
    EXIT_OK,
    BhyError,
    GuestEndedError,
    GuestError,
    HeldError,
    InDoubtError,
    UsageError,
    as_error,
)
from bhystream.guest import GO, HELD, PAUSED
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import RECORD, Event
from bhystream.handover.recorded import RecordedGuest, event_of
from bhystream.handover.state import Lock, Record, Records
from bhystream.handover.where import Where, outcome, unfinished, what_to_type
from bhystream.report import Console
from bhystream.signals import Ended, Interrupts

# Longer than a keeper, which has the lock, tries to resume a guest.
_LOCK_SECONDS = 150.0


class Recovery:
    """The end of one stream, by the destination's answers and the source's record."""

    def __init__(
        self,
        base: Path,
        console: Console,
        guest: str | None,
        words: Mapping[str, Answer],
        interrupts: Interrupts,
    ) -> None:
        """Do nothing yet.

        base: the state directory.  guest: the guest that the stream must be of (name,
        operand or stream id), or None for any.  words: the decisive answers, by word.
        """
        self._base = base
        self._console = console
        self._guest = guest
        self._words = words
        self._interrupts = interrupts
        self._records = Records(base, "source")

    def without_hello(self) -> NoReturn:
        """Raise what it means that no answer has come.

        InDoubtError if a guest is in doubt here or a record cannot be read, else GuestError.
        """
        for error in self._records.broken():
            raise InDoubtError(f"no answer came, and {error}", error.hint)
        doubtful = [
            record
            for record in self._records.all()
            if record.phase == GO and self._guest in (None, record.guest, record.operand, record.id)
        ]
        if doubtful:
            names = ", ".join(record.guest for record in doubtful)
            raise InDoubtError(
                f"no answer came; in doubt, and paused here: {names}",
                "\n".join(
                    f"guest {record.guest}: {what_to_type(Where.DOUBT, record, self._base)}"
                    for record in doubtful
                ),
            )
        raise GuestError("no answer came, and no guest is in doubt here")

    def distrusted(self, hello: Answer) -> NoReturn:
        """Raise the error that says where the guest is if the answers cannot be believed.

        InDoubtError or HeldError by the record; UsageError without one, or in PAUSED.
        """
        record = self._get(hello)
        if record is not None and record.phase != PAUSED:
            self._undecided(record, hello, "the answers cannot be believed")
        raise UsageError("the answers were not handed on")

    def act(self, hello: Answer, *, met: bool) -> int:
        """Do for the guest what the answers say; return the exit status.

        met: a bhysend of this stream was there, and ended without telling a status.
        Raises UsageError for another guest's stream, GuestError if the guest runs here,
        HeldError if it stands paused here, or is left here while it runs at the
        destination, and InDoubtError if it may run there, or runs nowhere.
        """
        record = self._get(hello)
        if record is None:
            return self._without_record(hello, met)
        if self._guest not in (None, record.guest, record.operand, record.id):
            raise UsageError(f"stream {hello.id} is of guest {record.guest}, not {self._guest}")
        with self._lock(record, hello):
            current = self._get(hello)
            if current is None:
                return self._without_record(hello, met)
            return self._settle(RecordedGuest(self._records, current), hello)

    def _get(self, hello: Answer) -> Record | None:
        """Return the stream's record, None if there is none.

        Raises InDoubtError if the record cannot be read, because its guest may be in doubt.
        """
        try:
            return self._records.get(hello.id)
        except BhyError as error:
            raise InDoubtError(str(error), error.hint) from error

    def _lock(self, record: Record, hello: Answer) -> Lock:
        """Take the guest's lock, after the keeper has released it.  The caller owns the lock.

        A signal may end the wait, because nothing has been done yet.
        """
        deadline = time.monotonic() + _LOCK_SECONDS
        try:
            try:
                self._interrupts.obey()
                return self._awaited_lock(record, hello, deadline)
            finally:
                self._interrupts.ignore(lambda name: None)
        except Ended as ended:
            self._undecided(record, hello, str(ended.as_error()))

    def _awaited_lock(self, record: Record, hello: Answer, deadline: float) -> Lock:
        while True:
            try:
                return Lock(self._base, record.lock, f"guest {record.guest}")
            except GuestError as error:
                if time.monotonic() > deadline:
                    self._undecided(record, hello, str(error))
                time.sleep(0.1)

    def _settle(self, recorded: RecordedGuest, hello: Answer) -> int:
        record = recorded.record
        name = f"guest {record.guest}"
        host = record.there or hello.host
        event = self._event(record, hello)
        acts = RECORD.get((record.phase, event))
        if acts is None:
            self._undecided(record, hello, self._why(record, hello))
        try:
            recorded.settle(event)
        except GuestEndedError:
            with contextlib.suppress(BhyError):
                recorded.forget()
            raise InDoubtError(
                f"{name}: {host} has not started the guest, and its hypervisor here is gone: "
                "the guest runs nowhere"
            ) from None
        except Exception as raised:  # whatever it is, the status says where the guest is
            found = unfinished(
                recorded.record, acts, recorded.undone, as_error(raised), self._base, host
            )
            if found.where != Where.HERE:
                raise HeldError(f"{name}: {found.text}", found.hint) from raised
            hint = f"{name}: {found.text}\n{found.hint}"
            raise GuestError(f"{host}: {self._why_not_started()}", hint) from raised
        if outcome(record.phase, acts) == Where.THERE:
            self._console.say(f"{name}: it runs on {host}, and is gone here")
            self._console.log(f"{name}: it runs on {host}, and is gone here")
            return EXIT_OK
        raise GuestError(f"{host}: {self._why_not_started()}", f"{name}: it runs here")

    def _why_not_started(self) -> str:
        failed = self._words.get("FAILED")
        return failed.text if failed else "it was not started there"

    def _event(self, record: Record, hello: Answer) -> Event:
        """Return the event that the answers are for this record.

        Raises HeldError if the answers contradict the record.
        """
        final = self._words.get("RUNNING") or self._words.get("FAILED")
        event = event_of(record, hello, final)
        if (record.phase, event) in RECORD and not (
            record.phase == PAUSED and "RAN" in self._words
        ):
            return event
        if record.phase == PAUSED and ("RUNNING" in self._words or "RAN" in self._words):
            # PAUSED says that bhysend or its keeper was about to resume the guest, and has not.
            raise HeldError(
                f"guest {record.guest}: paused here; {hello.host} says that it started the guest",
                f"if it surely does not run there: bhysend --resume {record.id}",
            )
        return Event.ALONE

    def _undecided(self, record: Record, hello: Answer, why: str) -> NoReturn:
        """Raise the error that says what the operator has to do for a guest paused here."""
        name = f"guest {record.guest}"
        if record.phase == GO:
            raise InDoubtError(
                f"{name}: in doubt: {why}", what_to_type(Where.DOUBT, record, self._base)
            )
        if record.phase != HELD:
            raise HeldError(f"{name}: {record.phase} here: {why}", f"see bhysend -l {record.id}")
        hints = {
            "RUNNING": f"{hello.host} says that it runs there: bhysend --discard {record.id}",
            "FAILED": f"{hello.host} says that it never ran there: bhysend --resume {record.id}",
        }
        found = [hint for word, hint in hints.items() if word in self._words]
        raise HeldError(f"{name}: held here", found[0] if found else why)

    def _why(self, record: Record, hello: Answer) -> str:
        """Return the reason why the answers decide nothing."""
        if record.host and (record.host, record.directory) != hello.args:
            return f"the stream went to {record.host} ({record.directory}), not to {hello.args[0]}"
        if "RAN" in self._words:
            return f"{hello.host} cannot say whether the guest ran there; look there"
        if "UNKNOWN" in self._words:
            return f"{hello.host} does not know the stream"
        return f"no answer came from {hello.host}"

    def _without_record(self, hello: Answer, met: bool) -> int:
        """Return 0, or raise what it means that there is no record.

        Either the move is settled, or the record is another user's.
        """
        if met:
            if "RUNNING" in self._words:
                return EXIT_OK
            raise GuestError("bhysend is gone; the guest runs on here")
        who = f"user id {os.geteuid()}, {self._base}"
        text = f"neither a bhysend nor a guest of stream {hello.id} is here ({who})"
        if any(word in self._words for word in ("READY", "RUNNING", "RAN")):
            raise InDoubtError(
                text,
                "if the move was settled before, there is nothing left to do;\n"
                "else its record is another user's, or in another BHYSEND_STATE_DIR",
            )
        raise GuestError(text, "nothing was started at the destination")
