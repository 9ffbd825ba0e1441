"""BhyveSource: a running bhyve guest as base.Source.

    open      opens the VM, maps its memory, reads its configuration, and finds the
              process that listens at its checkpoint socket (opened.py)
    prepare   rehearses the checkpoint, and makes all that the pause needs (ready.py)
    pause     runs the checkpoint, in which the guest stands paused

bhyve has no command to pause a guest and resume it later, but a checkpoint
pauses the guest as long as it lasts: bhyve pauses vCPUs and devices before it
saves the state, and resumes them afterwards.  bhyve writes FILE.meta last, and
bhysend knows its contents (names, order and sizes) from an earlier checkpoint of
the same guest, the rehearsal.  The rehearsal also shows that every device can be
saved, and how long that takes.

bhysend reads the memory from its own mapping, not from a file that bhyve writes.

Run on FreeBSD 15.1, emulated AMD: rehearsal, pause, resume and discard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bhystream.backend.bhyve import backing, identity, verdict
from bhystream.backend.bhyve.config import devices
from bhystream.backend.bhyve.host import Host, Vm
from bhystream.backend.bhyve.identity import CONF, POWER_BUTTON
from bhystream.backend.bhyve.layout import clamped
from bhystream.backend.bhyve.opened import in_its_words, open_guest
from bhystream.errors import BhyError, InternalError, Reason, from_oserror
from bhystream.guest import Fixed, Head, Json

if TYPE_CHECKING:  # a dry run pauses no guest
    from bhystream.backend.base import Prepared
    from bhystream.backend.bhyve.locks import Locks
    from bhystream.backend.bhyve.paused import BhyvePaused
    from bhystream.backend.bhyve.ready import Ready

# Times to assume before a measurement: to pause and save, and to load at the destination.
_SAVE_NS = 150_000_000
_LOAD_NS = 100_000_000
_WRITE_BYTES_PER_SECOND = 1 << 30  # the speed of a memory file on a tmpfs


class BhyveSource:
    """A running guest, given by its name."""

    def __init__(
        self, host: Host, name: str, base: Path, config_path: str | None, *, force: bool
    ) -> None:
        """Open the guest.

        base: the state directory.  config_path: the file of -C, or None to use
        what vm-bhyve knows, or what bhyrecv started the guest with.  force:
        overrule soft reasons.  Raises what open_guest() raises: GuestError,
        IncompatibleError, AccessError.
        """
        self._base = base
        self._opened = open_guest(host, name, base, config_path, force=force)
        self._ready: Ready | None = None
        self._was_asked = False
        self._control: Vm | None = None  # opened for the first suspend_vcpus()
        self._suspended: set[int] = set()
        # close() removes the directory through this stack, unless pause() was called.
        self._made = contextlib.ExitStack()

    @property
    def name(self) -> str:
        """Return the guest's name."""
        return self._opened.name

    @property
    def lock_name(self) -> str:
        """Return the hypervisor and the name, which is unique on a host."""
        return f"{self._opened.host.kind}-{self._opened.name}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        host = self._opened.host
        section = backing.described(host, self._opened.config)
        layout = self._opened.memory.layout
        described: Json = identity.describe(host)
        with contextlib.suppress(BhyError):  # the guest moves without it
            has_button = host.has_power_button(self._opened.process.pid)
            described = {**described, POWER_BUTTON: has_button}
        if manager := self._opened.manager:
            from bhystream.backend.bhyve import vmconf

            with contextlib.suppress(BhyError, OSError):  # the guest moves without it
                described = {**described, CONF: vmconf.shareable(manager.conf())}
        return Head(described, layout, section, devices(section))

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for."""
        return [f"{word}=" for word in self._opened.config.section["resources"]]

    def disks(self) -> Mapping[str, str]:
        """Return the paths of the disks, by their words."""
        config = self._opened.config
        return backing.disks(config.section, config.full)

    def warnings(self) -> Sequence[Reason]:
        """Return what no program can repair, and why bhyve writes a memory file, if it does."""
        from bhystream.backend.bhyve.carriable import reasons

        guest = self._opened
        is_wired = guest.memory.is_wired
        found = verdict.warnings(guest.config.section, guest.host, is_wired=is_wired)
        found += reasons(guest.host, guest.name, guest.ncpus)
        why = self._ready.warning if self._ready else None
        if why := why or clamped(guest.host, guest.memory.size_bytes):
            what = (
                f"memory file: bhyve writes the memory into {self._base / 'held'} while the guest"
                f" stands, in a rehearsal and in the pause: {why.what}"
            )
            found.append(Reason(what, why.cure))
        if guest.manager is None:
            return found
        return in_its_words(found, guest.manager, guest.config.full)

    def memory(self) -> Sequence[memoryview]:
        """Return the guest's memory."""
        return self._opened.memory.views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that may be other than zero."""
        return self._opened.memory.touched()

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Yield the extents that the kernel's log says were written since the last call.

        Returns None if the kernel has no such log, and also during the pause:
        some devices go on writing then, and the log covers only the vCPUs.
        """
        return None if self._was_asked else self._opened.memory.changed()

    def require_described(self) -> None:
        """Do nothing: a bhyve's devices and disks never change after its start."""

    def fixed(self) -> Fixed:
        """Return what the rehearsal took, or what is usual; and what the load usually takes."""
        guest = self._opened
        size = guest.memory.size_bytes
        written = size if clamped(guest.host, size) else 0
        state_ns = _SAVE_NS + written * 10**9 // _WRITE_BYTES_PER_SECOND
        if self._ready:
            state_ns = self._ready.rehearsal.took_ns
        return Fixed(state_ns, _LOAD_NS, guest.ncpus, is_early=True)

    def prepare(self, id_: str) -> Prepared:
        """Make the directory, rehearse, make the FIFO.  Raises what make_ready() raises."""
        from bhystream.backend.base import Prepared
        from bhystream.backend.bhyve.ready import make_ready
        from bhystream.backend.bhyve.snapshotdir import SnapshotDir

        guest, base = self._opened, self._base
        guest.require_started()
        directory = SnapshotDir(base / "held" / id_)
        self._made.callback(directory.remove, guest.host)
        directory.sweep(guest.host, base / "lock" / self.lock_name, base / "source")
        self._ready = ready = make_ready(guest, directory)
        if guest.manager is not None:
            self._made.callback(_stays, guest.manager.locks)
            level = guest.host.sysctl("kern.securelevel") or ""
            guest.manager.locks.leaves(is_secured=level.strip() not in ("-1", "0"))
        return Prepared(ready.record.to_json(), ready.rehearsal.text)

    def suspend_vcpus(self) -> None:
        """Suspend every vCPU that runs; the devices go on.

        Raises GuestError, AccessError, and InputOutputError if that cannot be noted.
        """
        from bhystream.backend.bhyve import suspended

        if self._control is None:
            self._control = self._opened.host.open_vm(self.name, is_writable=True)
            self._mark_throttled()
        suspended.suspend(self._control, self._suspended)

    def _mark_throttled(self) -> None:
        """Note, for the keeper, that the vCPUs may be suspended by us."""
        if self._ready is None:
            raise InternalError("BhyveSource: prepare() was not called")
        mark = self._ready.directory.throttled
        try:
            mark.touch(0o600)
        except OSError as error:
            raise from_oserror(error, f"make {mark}") from None

    def resume_vcpus(self) -> None:
        """Let every vCPU run that suspend_vcpus() has suspended.  Raises GuestError."""
        from bhystream.backend.bhyve import suspended

        if self._control is not None:
            suspended.resume(self._control, self._suspended)
            self._suspended.clear()

    def pause(self, stopping: Callable[[], None] = lambda: None) -> BhyvePaused:
        """Pause the guest in a checkpoint, and take its state.

        If that fails, the guest is resumed, and a request that bhyve has not
        served is withdrawn.  Raises what Ready.pause() raises.
        """
        if self._ready is None:
            raise InternalError("BhyveSource: prepare() was not called")
        # From here on the paused guest removes the directory, even if the request fails.
        self._was_asked = True
        self._made.pop_all()
        with contextlib.suppress(OSError):
            self._ready.directory.throttled.unlink(missing_ok=True)
        stopping()
        return self._ready.pause()

    def close(self) -> None:
        """Release the mappings, and undo prepare() if pause() was never called.

        If the vCPUs could not be resumed, the directory stays: whoever finds the guest by its
        record needs it, to see that no checkpoint stands.
        """
        if self._suspended:
            self._made.pop_all()
        self._made.close()
        if self._control is not None:
            self._control.close()
        self._opened.memory.close()


def _stays(locks: Locks) -> None:
    """Tell vm-bhyve that a guest was not paused.  Never raises a BhyError."""
    with contextlib.suppress(BhyError):
        locks.take_back()
