"""A recorded guest of the source, and what is done to it when bhysend is gone.

The keeper, `bhysend -A`, `--discard` and `--resume` act through this: on the
record, which is on disk before anything is done, and on the hypervisor's
process, found again by what the record says of it.  Every act may be done
twice, by one who finds the record of another who was killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from bhystream import hypervisors
from bhystream.backend.base import Paused
from bhystream.errors import GoneError
from bhystream.guest import MOVED, PAUSED
from bhystream.handover import handshake
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import Act, Event
from bhystream.handover.state import Record, Records

_PHASES = {
    Act.RECORD_PAUSED: PAUSED,
    Act.RECORD_MOVED: MOVED,
}
# What an answer is to the table; others leave it as it stands.
EVENTS = {"RUNNING": Event.RUNNING, "FAILED": Event.FAILED}


def open_alive(record: Record) -> Paused | None:
    """Find the guest of a record; None if its hypervisor is gone.

    The caller closes it.  Raises GuestError.
    """
    paused = hypervisors.open_paused(record.revive)
    if paused.is_alive():
        return paused
    paused.close()
    return None


def end_guest(record: Record) -> None:
    """End the guest of a record for good, and remove what is left of one that is gone already.

    Raises GuestError.
    """
    paused = hypervisors.open_paused(record.revive)
    try:
        paused.discard(record.there if record.phase == MOVED else "")
    finally:
        paused.close()


def event_of(record: Record, hello: Answer | None, final: Answer | None) -> Event:
    """Return what came back means for a record: an answer of its own destination, or ALONE."""
    if hello is None or final is None or hello.id != record.id:
        return Event.ALONE
    if record.host and (record.host, record.directory) != hello.args:
        return Event.ALONE
    return EVENTS.get(final.word, Event.ALONE)


class Standing:
    """One recorded guest, while its lock is held."""

    def __init__(self, records: Records, record: Record, paused: Paused | None = None) -> None:
        """records: of the source.  paused: the guest, if the caller has found it; stays his."""
        self._records = records
        self.record = record
        self._paused = paused

    def settle(self, event: Event) -> Record:
        """Do what the table says; return the record as it was found.

        What the table does not have is left as it stands.  Raises BhyError;
        then it may be tried again.
        """
        found = self.record
        for act in handshake.RECORD.get((found.phase, event), ()):
            self._do(act)
        return found

    def forget(self) -> None:
        """Remove the record: there is no guest any more."""
        self._records.remove(self.record.id)

    def _do(self, act: Act) -> None:
        if act in _PHASES:
            self.record = self.record.moved(_PHASES[act])
            self._records.write(self.record)
        elif act == Act.FORGET:
            self.forget()
        elif act == Act.DISCARD:
            end_guest(self.record)
        elif act == Act.RESUME:
            self._resume()

    def _resume(self) -> None:
        """Let the guest run on.  Raises GoneError where there is none any more."""
        paused = self._paused or hypervisors.open_paused(self.record.revive)
        try:
            if not paused.is_alive():
                paused.clear()
                raise GoneError(f"guest {self.record.guest}: its hypervisor is gone")
            paused.resume()
        finally:
            if paused is not self._paused:
                paused.close()


def asking(command: Sequence[str]) -> list[str]:
    """Return the words of a command up to bhyrecv, to ask there again; [] if it is not seen.

    A word with a space is a shell's, and what stands before bhyrecv in it is not known.
    """
    for at, word in enumerate(command):
        if os.path.basename(word) == "bhyrecv" and not any(c.isspace() for c in word):
            return list(command[: at + 1])
    return []


def with_peer(record: Record, hello: Answer) -> Record:
    """Return the record with the destination that said this HELLO."""
    host, directory = hello.args
    return replace(record, host=host, directory=directory)
