"""A `bhyve -r` that is held, and is let go: from restore.py's held to released.

bhyve makes its socket after the whole restore and before it lets the vCPUs
run.  A node that others left was removed first, so a released one that has no
socket never ran.  Source: bhyverun.c, main(), FreeBSD 15.1; 14 read the same.
Between the socket and the vCPUs bhyve enters capability mode and sets the
clock, and could still end; so it is looked at once more a moment later.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from bhystream.backend.bhyve import fpu
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.keys import boolean
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.place import Place, Started
from bhystream.backend.bhyve.restoring import Bhyve, Mapped, writing
from bhystream.errors import BhyError, GuestError
from bhystream.guest import State

_MOMENT_S = 0.05  # from the socket to the vCPUs there are a few system calls


def rtc_seconds(keys: Mapping[str, str], now: int) -> int:
    """Return what bhyve sets a new guest's clock chip to, of seconds since the Epoch.

    Local time as if it were UTC, unless the configuration says otherwise.
    Source: usr.sbin/bhyve/rtc.c, rtc_time(), FreeBSD 15.1.
    """
    if boolean(keys.get("rtc.use_localtime", "true")) == "false":
        return now
    return calendar.timegm(time.localtime(now))


class HeldRestore:
    """One guest's bhyve; process and VM are ours until it runs.

    started: the process and the VM.  is_released: it was let go.  may_have_run:
    False as long as the vCPUs provably never ran.
    """

    def __init__(
        self,
        host: Host,
        place: Place,
        bhyve: Bhyve,
        started: Started,
        mapped: Mapped,
        last: LastPage,
        limit_s: float,
        undo: ExitStack,
    ) -> None:
        """Take over a bhyve that stands before its last page, and all that undo ends.

        limit_s: how long it may take to restore the guest.
        """
        self.started = started
        self.is_released = False
        self.may_have_run = False
        self._host = host
        self._place = place
        self._bhyve = bhyve
        self._mapped = mapped
        self._last = last
        self._limit_s = limit_s
        self._undo = undo

    @property
    def memory(self) -> Sequence[memoryview]:
        """Return the VM's memory, writable, a view for each segment; none after close()."""
        return self._mapped.views

    # Held.

    def load(self, kern: Sequence[bytes], states: Sequence[State]) -> None:
        """Give it its state, all but what lets it go.

        kern: FILE.kern in pieces, of the size that hold() was told.  states: of the FPU;
        for none it is not woken.  Raises BhyError; then call undo().
        """
        self.require_held()
        with writing(self._last.files.directory):
            self._last.fill(kern)
        if states:
            self._load_fpu(states)
        self.require_held()

    def _load_fpu(self, states: Sequence[State]) -> None:
        child = self._bhyve.child
        # Its own threads run the vCPUs, while its first one goes round in read(2).
        child.go_on()
        try:
            fpu.load(self._mapped.vm, self.memory[0], states, child.has_ended)
        except BhyError:
            if child.has_ended():
                raise self._ended() from None
            raise
        self._bhyve.stop(self._was_too_fast)

    def is_held(self) -> bool:
        """Say whether it stands held still, and lives."""
        return not self.is_released and not self._bhyve.child.has_ended()

    def require_held(self) -> None:
        """Raise GuestError, with its last words, where it has ended."""
        if not self.is_held():
            raise self._ended()

    def _ended(self) -> GuestError:
        return self._bhyve.ended(self._was_too_fast)

    def _was_too_fast(self) -> bool:
        return not self.is_released and self._bhyve.found_no_kern()

    # From held to running.

    def release(self) -> None:
        """Let it go, and return when it runs; it is nobody's from then on.

        Raises BhyError: then may_have_run says whether it may have, and if not,
        nothing of it is left.
        """
        child = self._bhyve.child
        try:
            if child.has_ended():
                raise self._ended()
            self.is_released = True
            with writing(self._last.files.directory):
                self._last.give(self.memory)
            child.go_on()
            self._await_socket()
        except BaseException:
            self.undo()
            raise
        child.let_go()

    def _await_socket(self) -> None:
        self._bhyve.until(
            lambda: listens(self._host, self._place.name),
            "not done",
            self._limit_s,
            self._was_too_fast,
        )
        if self._bhyve.child.ends_within(_MOMENT_S):
            raise self._ended()

    def set_clock(self) -> None:
        """Set the guest's clock chip: its saved time is that of the last access.  Raises BhyError.

        Not after close().  The guest runs on by the clock that it keeps itself; it
        asks the chip when it boots.  Source: sys/amd64/vmm/io/vrtc.c,
        vrtc_snapshot(), FreeBSD 15.1, read: base_uptime is not saved.
        """
        self._mapped.vm.set_rtc(rtc_seconds(self._place.keys, int(time.time())))

    # The end.

    def undo(self) -> None:
        """End what never ran; what may have run is left alone.  Never raises; twice is no error."""
        self.close()
        if self.is_released:
            socket, child = self._host.run_dir / self._place.name, self._bhyve.child
            if not socket.exists():
                child.kill()
            if socket.exists():
                self.may_have_run = True
                child.let_go()
                self._undo.pop_all()
        self._undo.close()

    def close(self) -> None:
        """Give up the VM and its memory; the bhyve stays as it is.  Twice is no error."""
        self._mapped.close()
