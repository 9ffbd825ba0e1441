"""BhyveSource: a running bhyve guest as base.Source.

    open      the VM, its memory mapped; its configuration; who listens at its
              checkpoint socket (opened.py)
    prepare   a rehearsal of the checkpoint, and all that the pause needs (ready.py)
    pause     the checkpoint, in which the guest stands held

bhyve has no pause that can be taken back, but its checkpoint is one, as long as
it lasts: vCPUs and devices are paused before the state is saved and resumed
behind it, and what it writes last tells nothing that another checkpoint of the
same guest does not tell: names, order and sizes.  So that can be known before.
The rehearsal shows too that every device can be saved, and how long it takes.

The memory is not written by bhyve but read from our mapping.

Run on FreeBSD 15.1, emulated AMD: rehearsal, hold, release and discard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from bhystream.backend.base import Prepared
from bhystream.backend.bhyve import backing, fpustate, identity, verdict
from bhystream.backend.bhyve.config import devices
from bhystream.backend.bhyve.held import BhyveHeld
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.opened import open_guest
from bhystream.backend.bhyve.ready import Ready, make_ready
from bhystream.backend.bhyve.snapshotdir import SnapshotDir, clamped
from bhystream.errors import InternalError
from bhystream.guest import Head

# Where nothing has been measured: to stop and to save; and to load, elsewhere.
_SAVE_NS = 150_000_000
_LOAD_NS = 100_000_000
_WRITE_BYTES_PER_SECOND = 1 << 30  # of a memory file in memory


class BhyveSource:
    """A running guest, named by its name."""

    def __init__(
        self, host: Host, name: str, base: Path, config_path: str | None, *, force: bool
    ) -> None:
        """Open the guest.

        base: the state directory.  config_path: of -C, or None for what
        vm-bhyve knows.  force: overrule soft reasons.  Raises GuestError,
        IncompatibleError, AccessError.
        """
        self._base = base
        self._opened = open_guest(host, name, config_path, force=force)
        self._ready: Ready | None = None
        self._was_asked = False
        # close() removes the directory by this, unless pause() was called.
        self._made = contextlib.ExitStack()

    @property
    def name(self) -> str:
        """Return the guest's name."""
        return self._opened.name

    @property
    def lock_name(self) -> str:
        """Return the hypervisor and the name: there is one guest of a name on a host."""
        return f"{self._opened.host.kind}-{self._opened.name}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        host = self._opened.host
        section = backing.described(host, self._opened.config)
        layout = self._opened.memory.layout
        return Head(identity.describe(host), layout, section, devices(section))

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for."""
        return [f"{word}=" for word in self._opened.config.section["resources"]]

    def warnings(self) -> Sequence[str]:
        """Return what no tool can mend, and why the memory file cannot be left out."""
        guest = self._opened
        is_wired = guest.memory.is_wired
        found = verdict.warnings(guest.config.section, guest.host, is_wired=is_wired)
        found += fpustate.reasons(guest.host, guest.name, guest.ncpus)
        why = self._ready.warning if self._ready else ""
        if why := why or clamped(guest.host, guest.memory.size_bytes):
            found.append(
                f"memory file: bhyve writes the memory into {self._base / 'held'} while the guest"
                f" stands, in a rehearsal and in the pause: {why}"
            )
        return found

    def memory(self) -> Sequence[memoryview]:
        """Return the guest's memory."""
        return self._opened.memory.views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that may be other than zero."""
        return self._opened.memory.touched()

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Yield what the kernel saw written since the last call, where it keeps such a log.

        None in the hold: some devices go on, and the log is of vCPUs.
        """
        return None if self._was_asked else self._opened.memory.changed()

    def require_described(self) -> None:
        """Do nothing: bhyve's devices and disks stay what they were at its start."""

    def fixed_ns(self) -> int:
        """Return what the rehearsal took, and what to load it may take elsewhere."""
        if self._ready:
            return self._ready.rehearsal.took_ns + _LOAD_NS
        size = self._opened.memory.size_bytes
        written = size if clamped(self._opened.host, size) else 0
        return _SAVE_NS + _LOAD_NS + written * 10**9 // _WRITE_BYTES_PER_SECOND

    def prepare(self, id_: str) -> Prepared:
        """Make the directory, rehearse, make the FIFO."""
        guest, base = self._opened, self._base
        guest.require_started()
        directory = SnapshotDir(base / "held" / id_)
        self._made.callback(directory.remove, guest.host)
        directory.sweep(guest.host, base / "lock" / self.lock_name, base / "source")
        self._ready = ready = make_ready(guest, directory)
        return Prepared(ready.record.to_json(), ready.rehearsal.text)

    def pause(self) -> BhyveHeld:
        """Hold the guest in a checkpoint, and take its state.

        Where that fails, the guest is let go; a request that was not served
        is taken back.
        """
        if self._ready is None:
            raise InternalError("BhyveSource: prepare() was not called")
        # From here on the directory is the paused guest's to remove, asked or not.
        self._was_asked = True
        self._made.pop_all()
        return self._ready.pause()

    def close(self) -> None:
        """Give up the mappings; what prepare() made too, if the guest was never asked."""
        self._made.close()
        self._opened.memory.close()
