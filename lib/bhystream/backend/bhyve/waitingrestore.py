"""A `bhyve -r` that waits for the last page, and its release: restore.py's waiting to released.

bhyve makes its socket after the whole restore and before it lets the vCPUs run.
A socket that another bhyve left was removed first, so a released bhyve without a
socket never ran the guest.  Source: usr.sbin/bhyve/bhyverun.c, main(), FreeBSD
15.1, read; 14 is the same.
Between the socket and the vCPUs bhyve enters capability mode and sets the
clock, and could still end; so bhyrecv checks once more, a moment later, that
bhyve is alive.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from bhystream.backend.bhyve import fpu
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.keys import boolean
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.restoredguest import RestoredGuest, Started
from bhystream.backend.bhyve.restoring import Bhyve, Mapped, writing
from bhystream.errors import BhyError, GuestError
from bhystream.guest import State

_MOMENT_S = 0.05  # bhyve makes only a few system calls between the socket and the vCPUs


def rtc_seconds(keys: Mapping[str, str], now: int) -> int:
    """Return the seconds to which bhyve would set a new guest's clock chip.

    now: seconds since the Epoch.  The result is the local time as if it were
    UTC, unless the key rtc.use_localtime is false.
    Source: usr.sbin/bhyve/rtc.c, rtc_time(), FreeBSD 15.1.
    """
    if boolean(keys.get("rtc.use_localtime", "true")) == "false":
        return now
    return calendar.timegm(time.localtime(now))


class WaitingRestore:
    """One guest's waiting bhyve; this object owns process and VM until the guest runs.

    guest: its record.  started: the process and the VM.  is_released: whether bhyve was released.
    is_connected: False if the guest has lost its power button.
    may_have_run: False as long as the vCPUs provably never ran.
    limit_s: how many seconds bhyve may take to restore the guest.
    """

    def __init__(
        self,
        host: Host,
        guest: RestoredGuest,
        bhyve: Bhyve,
        started: Started,
        mapped: Mapped,
        last: LastPage,
        limit_s: float,
        undo: ExitStack,
        *,
        is_connected: bool,
    ) -> None:
        """Take over a bhyve that waits for the last page, and everything that undo ends."""
        self.started = started
        self.is_connected = is_connected
        self.is_released = False
        self.may_have_run = False
        self._host = host
        self.guest = guest
        self._bhyve = bhyve
        self._mapped = mapped
        self._last = last
        self.limit_s = limit_s
        self._undo = undo

    @property
    def memory(self) -> Sequence[memoryview]:
        """Return the VM's memory, writable, a view for each segment; none after close()."""
        return self._mapped.views

    # While bhyve waits.

    def load(self, kern: Sequence[bytes], states: Sequence[State]) -> None:
        """Give the state to bhyve, all but the last page.

        kern: FILE.kern in pieces, of the size that hold() was told.  states: of
        the FPU; if there are none, bhyve stays stopped.  Raises BhyError if bhyve
        has ended or refuses the state; then call undo().
        """
        self.require_held()
        with writing(self._last.files.directory):
            self._last.fill(kern)
        if states:
            self._load_fpu(states)
        self.require_held()

    def change_kern(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Replace bytes of FILE.kern, each at its offset, after load() and before release().

        Raises BhyError if that fails; then call undo().
        """
        with writing(self._last.files.directory):
            self._last.change(pieces)

    def _load_fpu(self, states: Sequence[State]) -> None:
        child = self._bhyve.child
        # bhyve's vCPU threads run the stub, while its first thread loops in read(2).
        child.go_on()
        try:
            fpu.load(self._mapped.vm, self.memory[0], states, child.has_ended)
        except BhyError:
            if child.has_ended():
                raise self._ended() from None
            raise
        self._bhyve.stop(self._was_too_fast)

    def is_held(self) -> bool:
        """Say whether bhyve is alive and was not released."""
        return not self.is_released and not self._bhyve.child.has_ended()

    def require_held(self) -> None:
        """Raise GuestError, with the last line of bhyve's log, unless bhyve still waits."""
        if not self.is_held():
            raise self._ended()

    def _ended(self) -> GuestError:
        return self._bhyve.ended(self._was_too_fast)

    def _was_too_fast(self) -> bool:
        return not self.is_released and self._bhyve.found_no_kern()

    # From waiting to running.

    def release(self) -> None:
        """Release bhyve; return when the guest runs, independent of bhyrecv from then on.

        Raises BhyError if bhyve ends or takes too long.  Then may_have_run says
        whether the vCPUs may have run; if not, the process and the VM are gone.
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
            lambda: listens(self._host, self.guest.name),
            "the guest is not restored",
            self.limit_s,
            self._was_too_fast,
        )
        if self._bhyve.child.ends_within(_MOMENT_S):
            raise self._ended()

    def set_clock(self) -> None:
        """Set the guest's clock chip, whose saved time is that of the chip's last access.

        Must not be called after close().  The running guest uses a clock that it
        keeps itself, and reads the chip when it boots.  Source:
        sys/amd64/vmm/io/vrtc.c, vrtc_snapshot(), FreeBSD 15.1, read: base_uptime is
        not saved.  Raises BhyError if the chip cannot be set.
        """
        self._mapped.vm.set_rtc(rtc_seconds(self.guest.keys, int(time.time())))

    # The end.

    def undo(self) -> None:
        """End bhyve and its VM, unless the guest may have run.

        Never raises; may be called twice.
        """
        self.close()
        if self.is_released:
            socket, child = self._host.run_dir / self.guest.name, self._bhyve.child
            if not socket.exists():
                child.kill()
            if socket.exists():
                self.may_have_run = True
                child.let_go()
                self._undo.pop_all()
        self._undo.close()

    def close(self) -> None:
        """Close the VM and release its memory; bhyve stays as it is.  May be called twice."""
        self._mapped.close()
