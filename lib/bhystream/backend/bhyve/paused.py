"""A bhyve guest that stands paused in a checkpoint, or is about to.

The guest's bhyve has everything: memory, devices, disks, FPU.  bhysend has only
the FIFO that releases the guest, in a directory (snapshotdir.py), and a record
of that directory.  So the guest stays paused whichever of our processes dies, any
process can release it or end it, and it ends with its host.

    request    ckp.kern is a file: the checkpoint has begun, and the guest stands
               paused, or soon will, or runs again
               ckp.kern is a directory: the request was withdrawn before it began
    paused     the FIFO is full, and every vCPU waits in bhyve
    resume     puts back what the journal says (lent.py), then reads the FIFO until
               the request has been served
    discard    kills bhyve (SIGKILL), waits for its end, then destroys the VM

A full FIFO alone only says that bhyve blocks in its write of FILE.meta.  After a
failed checkpoint bhyve blocks there too, but the guest runs, because bhyve
resumes it before it writes the JSON that it has (snapshot.c, vm_checkpoint(),
xo_destroy() behind vm_vcpu_resume(), read).  The vCPUs tell the two cases apart:
vm_vcpu_pause() sets them all in VM_DEBUG_CPUS (read).

A guest is never resumed in order to be ended: resumed devices would finish
requests that they have queued for disks which another host uses by now.

A guest is known by its process.  A VM of the guest's name with another node is
another guest, and is left alone.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bhystream.backend.bhyve import checkpoint, fifo, fpustate, suspended
from bhystream.backend.bhyve.checkpoint import UnansweredError
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.backend.process import Identity, boot_id, is_alive, kill_process
from bhystream.errors import (
    AccessError,
    BhyError,
    GuestEndedError,
    GuestError,
    StaleError,
    from_oserror,
)
from bhystream.guest import Json, State

_SERVED_S = 60.0
_SETTLE_S = 10.0
_END_S = 60.0
_ENDED_S = 5.0  # a supervisor cleans up in two seconds or so
_SUPERVISOR_S = 60.0
_POLL_S = 0.005
_WAIT_S = 0.1
_ROLE = "source"
_MOVED = "moved-by-bhysend"  # written into run.lock if the destination is not known
_MAX_FIFO_BYTES = 16 << 20
_TEXTS = ("vmm_dir", "name", "directory", "node", "manager")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PausedRecord:
    """All that is needed to find the guest again.  Paths are absolute.

    kind: the host's kind.  vmm_dir: the stand-in's directory, "" on FreeBSD.
    process: the guest's bhyve.  directory: the guest's SnapshotDir.  node:
    Host.node_id() of the guest's VM; no other VM is ever destroyed.  full_bytes:
    how many bytes the FIFO takes.  manager: the guest's directory in vm-bhyve's
    datastore, "" if vm-bhyve does not manage the guest.
    """

    kind: str
    vmm_dir: str
    name: str
    process: Identity
    directory: str
    node: str
    full_bytes: int
    manager: str

    def to_json(self) -> Json:
        """Return the record as JSON."""
        found = {**asdict(self), "process": self.process._asdict()}
        return {"hypervisor": found.pop("kind"), "role": _ROLE, **found}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> PausedRecord:
        """Return what to_json() wrote.  Raises GuestError if the record is anything else."""
        try:
            fields = dict(record)
            if fields.pop("role") != _ROLE:
                raise ValueError("role")
            process = dict(fields.pop("process"))
            identity = Identity(
                _of(int, process.pop("pid")),
                _of(int, process.pop("start_ticks")),
                _of(str, process.pop("boot_id")),
            )
            made = PausedRecord(
                kind=_of(str, fields.pop("hypervisor")),
                process=identity,
                full_bytes=_of(int, fields.pop("full_bytes")),
                **{key: _of(str, fields.pop(key)) for key in _TEXTS},
            )
            if process or fields:
                raise ValueError(", ".join([*process, *fields]))
            if not 1 < made.full_bytes <= _MAX_FIFO_BYTES or not Path(made.directory).is_absolute():
                raise ValueError("full_bytes or directory")
        except (KeyError, TypeError, ValueError) as error:
            raise GuestError(f"cannot read the record of a bhyve guest: {error}") from None
        return made


def _of(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of the type {kind.__name__}")
    return value


def open_paused(record: Json, host_of: Callable[[str], Host]) -> BhyvePaused:
    """Return the guest of a record, paused or not.

    host_of: returns the host of a record by its vmm_dir.  Raises GuestError if
    the record cannot be read.
    """
    found = PausedRecord.from_json(record)
    return BhyvePaused(host_of(found.vmm_dir), found)


class BhyvePaused:
    """base.Paused for a source's guest.  No descriptor stays open between two calls."""

    def __init__(
        self,
        host: Host,
        record: PausedRecord,
        states: Sequence[State] = (),
        reasons: Sequence[str] = (),
    ) -> None:
        """Take a guest.

        host: the record's.  states: the state that the pause has saved.
        reasons: what the states lack, and why.
        """
        self.record = record
        self.reasons = list(reasons)
        self._states = states
        self._who = f"guest {record.name}"
        self._host = host
        self._directory = SnapshotDir(Path(record.directory))
        self._locks: Locks | None = None
        if record.manager:
            self._locks = Locks(record.name, Path(record.manager), socket.gethostname())

    def states(self) -> Sequence[State]:
        """Return the state that the pause has saved; none if the guest was found by its record."""
        return self._states

    # Questions.

    def is_alive(self) -> bool:
        """Say whether the guest's bhyve is alive."""
        return is_alive(self.record.process)

    def stands(self) -> bool:
        """Say whether the guest stands paused.  Raises BhyError if that cannot be seen."""
        return self._is_full() and self._vcpus_stand()

    def _is_full(self) -> bool:
        try:
            return fifo.pending(self._directory.files.meta) == self.record.full_bytes
        except OSError as error:
            raise from_oserror(error, f"look at {self._directory.files.meta}") from None

    def _vcpus_stand(self) -> bool:
        """Say whether no vCPU runs: each one waits in bhyve, or the VM was destroyed.

        If a journal exists, a vCPU was perhaps left in the stub.  The kernel does
        not call such a vCPU suspended, and yet bhyve's thread of it waits, since
        a journal is written only while the guest stands paused.
        """
        if self._directory.journal.exists():
            return True
        if not self._host.exists(self.record.name):
            return True
        vm = self._host.open_vm(self.record.name)
        try:
            sockets, cores, threads = vm.topology()
            return len(vm.waiting_vcpus()) >= sockets * cores * threads
        finally:
            vm.close()

    def require_paused(self) -> None:
        """Raise an error unless the guest still stands paused.

        The bytes in the FIFO are lost when bhyve ends, so a full FIFO is enough.
        The process, which takes time to look for on FreeBSD, decides only which
        error is raised: GuestEndedError if bhyve has ended, else StaleError.
        """
        if self.stands():
            return
        if not self.is_alive():
            raise GuestEndedError(f"{self._who}: its bhyve has ended while it stood paused")
        raise StaleError(
            f"{self._who}: another program let the guest run while it stood paused:"
            f" {self._directory.files.meta} was read",
            "what was sent is no longer this guest; leave that FIFO to bhysend",
        )

    def runs(self) -> bool:
        """Say whether the guest's vCPUs run; wait while a request of ours is under way.

        Raises UnansweredError if bhyve does not finish the request in _SERVED_S seconds.
        """
        meta = self._directory.files.meta
        end = time.monotonic() + _SERVED_S
        while self.is_alive():
            if self._is_full():
                return not self._vcpus_stand()
            if not fifo.has_reader(meta):
                return not self._is_lost()
            if time.monotonic() > end:
                raise UnansweredError(
                    f"{self._who}: its bhyve has not answered for {_SERVED_S:.0f} s"
                )
            time.sleep(_POLL_S)
        return False

    def _is_lost(self) -> bool:
        """Say whether the guest stands paused, and the FIFO that would release it was removed."""
        return not self._directory.files.meta.exists() and self._vcpus_stand()

    # Actions.

    def resume(self) -> None:
        """Let the guest run.

        Raises GuestEndedError if it has ended, GuestError if it cannot be resumed.
        """
        if self.is_alive():
            self._put_back()
            self.release()
            self._end_throttle()
            if self._is_lost():
                raise GuestError(
                    f"{self._who}: it stands paused, and the FIFO that would resume it was removed:"
                    f" {self._directory.files.meta}",
                    "it can only be ended: --discard",
                )
        is_gone = not self.is_alive()
        self.clear()
        if self._locks and is_gone:
            self._locks.ended()
        elif self._locks:
            self._locks.take_back()
        if is_gone:
            raise GuestEndedError(f"{self._who}: its bhyve has ended")

    def _put_back(self) -> None:
        """Put back the guest's registers and memory if bhysend was killed while it saved the FPU.

        Raises GuestError if that fails; then the guest must not be released.
        """
        if not self._directory.journal.exists():
            return
        name, cure = (
            self.record.name,
            "--resume tries it again; if that fails too, it can only be ended: --discard",
        )
        try:
            if not self._is_full():
                cure = "it may run with wrong registers: power it off"
                raise GuestError("another program let the guest run meanwhile")
            if self._host.node_id(name) != self.record.node:
                raise GuestError("its VM was destroyed")
            fpustate.put_back(self._host, name, self._directory)
        except (GuestError, AccessError) as error:
            raise GuestError(
                f"{self._who}: bhysend was killed while it saved the FPU, and the registers were"
                f" not put back, so the guest would not go on where it was: {error}",
                cure,
            ) from None

    def release(self) -> bytes:
        """End every request of ours; return what bhyve wrote into the FIFO.

        A request that has not begun is withdrawn and never will begin; else the
        FIFO is read until the request has been served.  Raises GuestError if
        bhyve does not say that it was, and InputOutputError if the FIFO cannot be read.
        """
        if self._directory.withdraw():
            return b""
        found = bytearray()
        meta = self._directory.files.meta
        end = time.monotonic() + _SERVED_S
        try:
            while fifo.has_reader(meta) and self.is_alive():
                read, is_served = fifo.drain(meta, _WAIT_S)
                found += read
                if is_served:
                    break
                if time.monotonic() > end:
                    self._settle()  # another process may have the FIFO open
                    break
        except FileNotFoundError:
            pass  # see _is_lost()
        except OSError as error:
            raise from_oserror(error, f"read {meta}") from None
        return bytes(found).lstrip()

    def _end_throttle(self) -> None:
        """Let the vCPUs run if bhysend was killed while it held them back.

        Does nothing if a checkpoint may stand, or its release be under way: then bhyve itself
        has suspended them, and the devices stand too.  bhyve makes ckp.kern first; if the
        directory was removed, nobody knows.  Without our mark another program has suspended
        them.
        """
        name, directory = self.record.name, self._directory
        if directory.files.kern.is_file() or not directory.throttled.exists():
            return
        if self._host.node_id(name) != self.record.node:
            return
        vm = self._host.open_vm(name, is_writable=True)
        try:
            suspended.resume(vm)
        finally:
            vm.close()

    def _settle(self) -> None:
        """Ask bhyve whether all requests have been served.  Raises GuestError without an answer."""
        run_dir, name = self._host.run_dir, self.record.name
        checkpoint.settle(run_dir, name, self._who, _SETTLE_S, self.record.process)

    def clear(self) -> None:
        """Remove the directory of a guest that was never paused, or runs, or has ended."""
        self._directory.remove(self._host)

    def discard(self, there: str) -> None:
        """End the guest for good: its process, its VM, its directory.  May be called twice.

        there: the host that the guest runs on now, "" if that is not known.
        Raises GuestError if the guest runs here or cannot be ended, and
        StaleError if another guest of its name is here while it runs elsewhere.
        """
        if self.runs():
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        had_ended = not self.is_alive()
        self._end()
        is_this_boot = self.record.process.boot_id == boot_id()
        if is_this_boot:
            self._await_supervisor(had_ended=had_ended)
        elif self._locks:
            self._locks.ended()
        if self._has_other(is_this_boot):
            if there:
                raise StaleError(
                    f"{self._who}: a VM of that name was made here since, and it runs on {there}",
                    "one of the two has to end; what supervises bhyve here may have started it",
                )
        else:
            if is_this_boot:
                self._destroy()
            self._leave_lock(there)
        self.clear()

    def _destroy(self) -> None:
        """Destroy the guest's VM, if it is there.

        If the guest had ended before, another bhyve may have taken over its VM (VM_REINIT).
        Raises StaleError then.
        """
        if listens(self._host, self.record.name):
            raise StaleError(
                f"{self._who}: it has ended, and another bhyve runs in its VM",
                "what supervises bhyve here may have started it; end that one first",
            )
        if self._host.node_id(self.record.name):
            self._host.destroy(self.record.name)

    def _end(self) -> None:
        """Tell the supervisor, then kill the guest's bhyve.  Raises GuestError if that fails."""
        if not self.is_alive():
            return
        if self._locks and self._locks.is_supervised():
            self._require_no_restart(self._locks)
            self._locks.before_kill()
        try:
            if not kill_process(self.record.process, _END_S):
                raise GuestError(f"cannot end its bhyve (process {self.record.process.pid})")
        except GuestError as error:
            with contextlib.suppress(BhyError):
                if self._locks:
                    self._locks.take_back()
            raise GuestError(f"{self._who}: {error}") from None

    def _require_no_restart(self, locks: Locks) -> None:
        """Raise GuestError if the supervisor would take the kill for a fault, and restart."""
        if self._host.knows_suspending_lock():
            return
        if starts_again(VmBhyveGuest(locks.name, locks.directory, locks.hostname)):
            raise GuestError(
                f"{self._who}: vm-bhyve would start it again (on_fault), and is older than 1.7.0",
                f"end its supervisor (vm _run {locks.name}) first",
            )

    def _has_other(self, is_this_boot: bool) -> bool:
        """Say whether the VM of the guest's name is a later one than the guest's."""
        node = self._host.node_id(self.record.name)
        return node != "" and not (is_this_boot and node == self.record.node)

    def _await_supervisor(self, *, had_ended: bool) -> None:
        """Wait until vm-bhyve's supervisor has ended; until then it may remove the VM and taps.

        had_ended: bhyve had ended before.  Then the supervisor has perhaps ended too, and could
        not remove run.lock.  Raises GuestError if the supervisor does not end.
        """
        if had_ended and self._locks:
            self._locks.let_go()
        end = time.monotonic() + (_ENDED_S if had_ended else _SUPERVISOR_S)
        while self._locks and not self._has_other(True):
            if self._locks.supervisor_gone(_POLL_S):
                return
            if had_ended and time.monotonic() > end:
                self._locks.ended()
                return
            if time.monotonic() > end:
                raise GuestError(
                    f"{self._who}: its vm-bhyve supervisor does not end",
                    f"if no vm process of it is left: rm {self._locks.directory}/run.lock",
                )

    def _leave_lock(self, there: str) -> None:
        """Keep vm-bhyve from starting a guest that has moved or was ended."""
        if self._locks is None:
            return
        is_known = there and there != self._locks.hostname
        self._locks.gone_to(there if is_known else _MOVED)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def starts_again(guest: VmBhyveGuest) -> bool:
    """Say whether vm-bhyve starts a guest again after a fault.  Raises BhyError as conf()."""
    return guest.conf().get("on_fault", "shutdown") == "restart"
