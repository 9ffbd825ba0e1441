"""What `bhysend -A` does where no bhysend lives any more: it settles the move by its record.

The answers say what became of the guest at the destination, the record says
what may be done here, and handshake.RECORD puts the two together.  The status
says where the guest is, whatever fails on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from bhystream.errors import (
    OK,
    BhyError,
    BrokenError,
    GoneError,
    GuestError,
    HeldError,
    InDoubtError,
    UsageError,
)
from bhystream.guest import GO, HELD, PAUSED
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import RECORD, Event
from bhystream.handover.standing import Standing, event_of
from bhystream.handover.state import Lock, Record, Records
from bhystream.handover.where import Where, outcome, what_to_type
from bhystream.report import Console
from bhystream.signals import Interrupts

# A keeper tries for so long to resume a guest.
_LOCK_SECONDS = 150.0


class Settlement:
    """One stream's end, by what the destination has answered."""

    def __init__(
        self,
        base: Path,
        console: Console,
        guest: str | None,
        words: Mapping[str, Answer],
        interrupts: Interrupts,
    ) -> None:
        """guest: the name that the stream's must have, or None.  words: the answers, by word."""
        self._base = base
        self._console = console
        self._guest = guest
        self._words = words
        self._interrupts = interrupts
        self._records = Records(base, "source")

    def without_hello(self) -> NoReturn:
        """Say what it means that nobody has answered."""
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
        """Say where the guest is when the answers cannot be believed."""
        record = self._get(hello)
        if record is not None and record.phase != PAUSED:
            self._undecided(record, hello, "the answers cannot be believed")
        raise UsageError("the answers were not handed on")

    def act(self, hello: Answer, *, met: bool) -> int:
        """Do for the guest what the answers say; return the exit status.

        met: a bhysend of this stream was there, and was lost.  Raises BhyError.
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
            return self._settle(Standing(self._records, current), hello)

    def _get(self, hello: Answer) -> Record | None:
        """Return the stream's record.  One that is broken leaves its guest in doubt."""
        try:
            return self._records.get(hello.id)
        except BrokenError as error:
            raise InDoubtError(str(error), error.hint) from error

    def _lock(self, record: Record, hello: Answer) -> Lock:
        """Take the guest's lock, when its keeper has done what it does."""
        deadline = time.monotonic() + _LOCK_SECONDS
        self._interrupts.obey()
        try:
            while True:
                try:
                    return Lock(self._base, record.lock, f"guest {record.guest}")
                except GuestError as error:
                    if time.monotonic() > deadline:
                        self._undecided(record, hello, str(error))
                    time.sleep(0.1)
        finally:
            self._interrupts.ignore()

    def _settle(self, standing: Standing, hello: Answer) -> int:
        record = standing.record
        name = f"guest {record.guest}"
        host = record.there or hello.host
        event = self._event(record, hello)
        acts = RECORD.get((record.phase, event))
        if acts is None:
            self._undecided(record, hello, self._why(record, hello))
        try:
            standing.settle(event)
        except GoneError:
            standing.forget()
            raise InDoubtError(
                f"{name}: {host} has not started it, and its hypervisor here is gone: "
                "it runs nowhere"
            ) from None
        except BhyError as error:
            where = outcome(record.phase, acts, acts)
            text = "it stands paused here, and cannot be resumed"
            if where == Where.LEFT:
                text = f"it runs on {host}, and cannot be ended here"
            hint = what_to_type(where, record, self._base)
            raise HeldError(f"{name}: {text}: {error}", hint) from error
        if outcome(record.phase, acts) == Where.THERE:
            self._console.say(f"{name}: it runs on {host}, and is gone here")
            self._console.log(f"{name}: it runs on {host}, and is gone here")
            return OK
        failed = self._words.get("FAILED")
        why = failed.text if failed else "it was not started there"
        raise GuestError(f"{host}: {why}", f"{name}: it runs here")

    def _event(self, record: Record, hello: Answer) -> Event:
        """Return what the answers are for this record.  Raises HeldError for a contradiction."""
        final = self._words.get("RUNNING") or self._words.get("FAILED")
        event = event_of(record, hello, final)
        if (record.phase, event) in RECORD and not (
            record.phase == PAUSED and "RAN" in self._words
        ):
            return event
        if record.phase == PAUSED and ("RUNNING" in self._words or "RAN" in self._words):
            # Somebody was about to resume it, and did not come to it.
            raise HeldError(
                f"guest {record.guest}: paused here, and {hello.host} says that it started it",
                f"if it surely does not run there: bhysend --resume {record.id}",
            )
        return Event.ALONE

    def _undecided(self, record: Record, hello: Answer, why: str) -> NoReturn:
        """Say what is to be done by hand for a guest that stands here."""
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
        """Say why the answers decide nothing."""
        if record.host and (record.host, record.directory) != hello.args:
            return f"the stream went to {record.host} ({record.directory}), not to {hello.args[0]}"
        if "RAN" in self._words:
            return f"{hello.host} cannot say whether it ran there; look at it there"
        if "UNKNOWN" in self._words:
            return f"{hello.host} does not know the stream"
        return f"no answer came from {hello.host}"

    def _without_record(self, hello: Answer, met: bool) -> int:
        """Say what no record means: it is settled, or somebody else's."""
        if met:
            if "RUNNING" in self._words:
                return OK
            raise GuestError("bhysend is gone; the guest runs on here")
        who = f"user id {os.geteuid()}, {self._base}"
        text = f"neither a bhysend nor a guest of stream {hello.id} is here ({who})"
        if any(word in self._words for word in ("READY", "RUNNING", "RAN")):
            raise InDoubtError(
                text,
                "if it was settled before, that is all;\n"
                "else it is another user's, or in another BHYSEND_STATE_DIR",
            )
        raise GuestError(text, "nothing was started at the destination")
