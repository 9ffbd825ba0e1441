"""A recorded guest of the source, and what is done to it when bhysend is gone.

The keeper, `bhysend -A`, `--discard` and `--resume` act through this module: on
the record, which is on disk before anything is done, and on the hypervisor's
process, which is found again by the record.  Every act may be done twice, if a
process is killed and another finds its record.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bhystream import hypervisors
from bhystream.errors import GuestEndedError, InternalError
from bhystream.guest import MOVED, PAUSED
from bhystream.handover import handshake
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import Act, Event
from bhystream.handover.state import Record, Records

if TYPE_CHECKING:
    from bhystream.backend.base import Paused

_PHASES = {
    Act.RECORD_PAUSED: PAUSED,
    Act.RECORD_MOVED: MOVED,
}
# The event of an answer; any other answer leaves the guest as it stands.
EVENTS = {"RUNNING": Event.RUNNING, "FAILED": Event.FAILED}


def open_alive(record: Record) -> Paused | None:
    """Find the guest of a record; return None if its hypervisor is gone.

    The caller closes the result.  Raises GuestError if the record cannot be used here.
    """
    paused = hypervisors.open_paused(record.revive)
    if paused.is_alive():
        return paused
    paused.close()
    return None


def is_alive(record: Record) -> bool:
    """Say whether a recorded guest is here, running or ready to be resumed.  Raises GuestError."""
    paused = open_alive(record)
    if paused is None:
        return False
    paused.close()
    return True


def end_guest(record: Record) -> None:
    """End the guest of a record for good; if it has ended, remove what is left.

    Raises GuestError if the guest cannot be ended.
    """
    paused = hypervisors.open_paused(record.revive)
    try:
        paused.discard(record.there if record.phase == MOVED else "")
    finally:
        paused.close()


def event_of(record: Record, hello: Answer | None, final: Answer | None) -> Event:
    """Return the event of the last answer for a record; ALONE if another host has answered."""
    if hello is None or final is None or hello.id != record.id:
        return Event.ALONE
    if record.host and (record.host, record.directory) != hello.args:
        return Event.ALONE
    return EVENTS.get(final.word, Event.ALONE)


class RecordedGuest:
    """One recorded guest, whose lock the caller has.

    record: as it is on disk.  acts: those of settle().  undone: those of them that are
    not done yet, the one that failed first.
    """

    def __init__(self, records: Records, record: Record, paused: Paused | None = None) -> None:
        """records: the source's.  paused: the guest, if the caller has it open, and closes it."""
        self._records = records
        self.record = record
        self.acts: Sequence[Act] = ()
        self.undone: Sequence[Act] = ()
        self._paused = paused

    def settle(self, event: Event) -> None:
        """Do what the table says.  If the table has no entry, the guest is left as it stands.

        Raises what an act raises, GuestEndedError if the guest has ended.  settle() may
        then be called again, and goes on with the act that failed.
        """
        if not self.undone:
            self.acts = self.undone = handshake.RECORD.get((self.record.phase, event), ())
        while self.undone:
            self._do(self.undone[0])
            self.undone = self.undone[1:]

    def forget(self) -> None:
        """Remove the record.  Raises AccessError, InputOutputError."""
        self._records.remove(self.record.id)

    def _do(self, act: Act) -> None:
        match act:
            case Act.RECORD_PAUSED | Act.RECORD_MOVED:
                changed = self.record.with_phase(_PHASES[act])
                self._records.write(changed)
                self.record = changed
            case Act.FORGET:
                self.forget()
            case Act.DISCARD:
                end_guest(self.record)
            case Act.RESUME:
                self._resume()
            case _:
                raise InternalError(f"nobody can {act.value} without bhysend")

    def _resume(self) -> None:
        """Let the guest run on.  Raises GuestEndedError if the guest has ended."""
        paused = self._paused or hypervisors.open_paused(self.record.revive)
        try:
            if not paused.is_alive():
                paused.clear()
                raise GuestEndedError(f"guest {self.record.guest}: its hypervisor is gone")
            paused.resume()
        finally:
            if paused is not self._paused:
                paused.close()


def asking(command: Sequence[str]) -> list[str]:
    """Return the words of a command up to bhyrecv, for `bhyrecv -q`; [] if no word is bhyrecv.

    A word with a space is for a shell, and what precedes bhyrecv in it is not known.
    """
    for at, word in enumerate(command):
        if os.path.basename(word) == "bhyrecv" and not any(c.isspace() for c in word):
            return list(command[: at + 1])
    return []


def with_peer(record: Record, hello: Answer) -> Record:
    """Return the record, completed with the destination that said this HELLO."""
    host, directory = hello.args
    return record._replace(host=host, directory=directory)
