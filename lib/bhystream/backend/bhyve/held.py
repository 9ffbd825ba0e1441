"""A bhyve guest that stands held in a checkpoint of its own, or is about to.

It is a process that has everything: memory, devices, disks, FPU.  What is ours
is the way to let it go, in a directory (snapshotdir.py), and a record of where
that is.  So it stands whoever of us dies, any process can let it run or end it,
and it ends with its host.

    asked?     ckp.kern is a file      it has begun: it stands, comes to stand, or ran on
               ckp.kern is a directory it was taken back before
    stands     the FIFO is full, and every vCPU waits in bhyve
    resume     put back what the journal says (lent.py), then read the FIFO until the
               request has been served
    discard    SIGKILL, the end awaited, then the VM destroyed

A full FIFO alone says that bhyve stands in its write of FILE.meta, and a
checkpoint that failed stands there too, with the guest running: bhyve resumes
it first, and then writes what it has of the JSON.  Read: snapshot.c,
vm_checkpoint(), xo_destroy() behind vm_vcpu_resume().  The vCPUs tell the two
apart.  Read: vm_vcpu_pause() sets them all in VM_DEBUG_CPUS.

It is never resumed to be ended then: resumed devices finish what they have
queued for disks that are another host's by now.

A guest is known by its process.  A VM of its name with another node is another
guest, and is not touched.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bhystream.backend.bhyve import checkpoint, fifo, fpustate
from bhystream.backend.bhyve.checkpoint import UnansweredError
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.backend.process import Identity, boot_id, is_alive, kill_process
from bhystream.errors import AccessError, BhyError, GoneError, GuestError, TakenError, from_oserror
from bhystream.guest import Json, State

_SERVED_S = 60.0
_SETTLE_S = 10.0
_END_S = 60.0
_SUPERVISOR_S = 60.0
_POLL_S = 0.005
_WAIT_S = 0.1
_ROLE = "source"
_MOVED = "moved-by-bhysend"  # in run.lock, where the destination is not known
_MAX_FIFO_BYTES = 16 << 20
_TEXTS = ("vmm_dir", "name", "directory", "node", "manager")
_T = TypeVar("_T")


@dataclass(frozen=True)
class HeldRecord:
    """All that is needed to find the guest again.  Paths are absolute.

    kind: of the host.  vmm_dir: the stand-in's directory, "" on FreeBSD.
    node: Host.node_id() of its VM, the only one that is ever destroyed.
    full_bytes: what the FIFO takes.  manager: the guest's directory in
    vm-bhyve's datastore, "" where it is not vm-bhyve's.
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
        """Return the record, JSON."""
        found = asdict(self)
        return {"hypervisor": found.pop("kind"), "role": _ROLE, **found}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> HeldRecord:
        """Return what to_json() wrote.  Raises GuestError for anything else."""
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
            made = HeldRecord(
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


def open_held(record: Json, host_of: Callable[[str], Host]) -> BhyveHeld:
    """Return the guest of a record, wherever it stands.  Raises GuestError.

    host_of: returns the host of a record by its vmm_dir.
    """
    found = HeldRecord.from_json(record)
    return BhyveHeld(host_of(found.vmm_dir), found)


class BhyveHeld:
    """base.Paused for a source's guest.  It has nothing open between two calls."""

    def __init__(
        self,
        host: Host,
        record: HeldRecord,
        states: Sequence[State] = (),
        reasons: Sequence[str] = (),
    ) -> None:
        """host: the record's.  states: what the hold has saved.  reasons: what they do not have."""
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
        """Return the state that the hold has saved; of a guest that was found again, none."""
        return self._states

    # Where it is.

    def is_alive(self) -> bool:
        """Say whether its bhyve is here."""
        return is_alive(self.record.process)

    def stands(self) -> bool:
        """Say whether it stands held.  Raises BhyError."""
        return self._is_full() and self._vcpus_stand()

    def _is_full(self) -> bool:
        try:
            return fifo.pending(self._directory.files.meta) == self.record.full_bytes
        except OSError as error:
            raise from_oserror(error, f"look at {self._directory.files.meta}") from None

    def _vcpus_stand(self) -> bool:
        """Say whether no vCPU runs: each one waits in bhyve, or the VM was destroyed.

        One that was left in the stub is not suspended in the kernel, and yet
        its thread waits: a journal is written only while the guest stands.
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
        """See that it stands, as when its state was saved.

        What is in the FIFO ends with bhyve: to look for the process, which
        takes time on FreeBSD, is only to find the right words.
        """
        if self.stands():
            return
        if not self.is_alive():
            raise GoneError(f"{self._who}: its bhyve has ended while it stood held")
        raise TakenError(
            f"{self._who}: somebody let it run while it stood held: {self._directory.files.meta}"
            " was read",
            "what was sent is no longer this guest; leave that FIFO to bhysend",
        )

    def runs(self) -> bool:
        """Say whether its vCPUs run; wait while a request of ours is under way.

        Raises GuestError where that does not end.
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
        """Say whether it stands held, and the FIFO that it stands in was removed."""
        return not self._directory.files.meta.exists() and self._vcpus_stand()

    # What is done to it.

    def resume(self) -> None:
        """Let it run.  Raises GoneError, and GuestError where it cannot be let go."""
        if self.is_alive():
            self._put_back()
            self.release()
            if self._is_lost():
                raise GuestError(
                    f"{self._who}: it stands held, and what it could be let go by was removed:"
                    f" {self._directory.files.meta}",
                    "only its end is left: --discard",
                )
        is_gone = not self.is_alive()
        self.clear()
        if self._locks:
            self._locks.take_back()
        if is_gone:
            raise GoneError(f"{self._who}: its bhyve has ended")

    def _put_back(self) -> None:
        """Give it its registers and memory back, if one who stored its FPU was killed.

        Raises GuestError where that cannot be done: it is not let go then.
        """
        if not self._directory.journal.exists():
            return
        name, cure = (
            self.record.name,
            "--resume tries it again; else only its end is left: --discard",
        )
        try:
            if not self._is_full():
                cure = "nothing of it can be kept: power it off"
                raise GuestError("somebody let it run meanwhile")
            if self._host.node_id(name) != self.record.node:
                raise GuestError("its VM was destroyed")
            fpustate.put_back(self._host, name, self._directory)
        except (GuestError, AccessError) as error:
            raise GuestError(
                f"{self._who}: its FPU was being stored, and its registers were not put back: it"
                f" would not go on where it was: {error}",
                cure,
            ) from None

    def release(self) -> bytes:
        """See that no request of ours holds it any more; return what bhyve wrote into the FIFO.

        A request that has not begun never will; else the FIFO is read until
        the request has been served.  Raises GuestError where that cannot be seen.
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
                    self._settle()  # somebody else may have it open
                    break
        except FileNotFoundError:
            pass  # see _is_lost()
        except OSError as error:
            raise from_oserror(error, f"read {meta}") from None
        return bytes(found).lstrip()

    def _settle(self) -> None:
        """Ask bhyve whether all has been served.  Raises GuestError where it does not say."""
        run_dir, name = self._host.run_dir, self.record.name
        checkpoint.settle(run_dir, name, self._who, _SETTLE_S, self.record.process)

    def clear(self) -> None:
        """Remove the directory of a guest that was never asked, or runs, or has ended."""
        self._directory.remove(self._host)

    def discard(self, there: str) -> None:
        """End it for good: process, VM, what was saved of it.

        Twice is no error.  Raises GuestError for a guest that runs, and
        TakenError where another one has its name, and it runs elsewhere too.
        """
        if self.runs():
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        self._end()
        is_this_boot = self.record.process.boot_id == boot_id()
        if is_this_boot:
            self._await_supervisor()
        if self._has_other(is_this_boot):
            if there:
                raise TakenError(
                    f"{self._who}: a VM of that name was made here since, and it runs on {there}",
                    "one of the two has to end; what supervises bhyve here may have started it",
                )
        elif is_this_boot:
            # Where it has ended, another bhyve may have taken over its VM (VM_REINIT).
            if listens(self._host, self.record.name):
                raise TakenError(
                    f"{self._who}: it has ended, and another bhyve runs in its VM",
                    "what supervises bhyve here may have started it; end that one first",
                )
            if self._host.node_id(self.record.name):
                self._host.destroy(self.record.name)
            self._leave_lock(there)
        self.clear()

    def _end(self) -> None:
        """Kill its bhyve, with the supervisor told.  Raises GuestError."""
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
        """Refuse where the supervisor would take the end for a fault, and start the guest again."""
        if self._host.knows_suspending_lock():
            return
        if starts_again(VmBhyveGuest(locks.name, locks.directory, locks.hostname)):
            raise GuestError(
                f"{self._who}: vm-bhyve would start it again (on_fault), and is older than 1.7.0",
                f"end its supervisor (vm _run {locks.name}) first",
            )

    def _has_other(self, is_this_boot: bool) -> bool:
        """Say whether a VM of its name was made since."""
        node = self._host.node_id(self.record.name)
        return node != "" and not (is_this_boot and node == self.record.node)

    def _await_supervisor(self) -> None:
        """Wait for the end of vm-bhyve's: until then it may take the VM and taps for its own."""
        end = time.monotonic() + _SUPERVISOR_S
        while self._locks and not self._has_other(True):
            if self._locks.supervisor_gone(_POLL_S):
                return
            if time.monotonic() > end:
                raise GuestError(
                    f"{self._who}: its vm-bhyve supervisor does not end",
                    f"if no vm process of it is left: rm {self._locks.directory}/run.lock",
                )

    def _leave_lock(self, there: str) -> None:
        """Keep vm-bhyve from starting what is gone."""
        if self._locks is None:
            return
        if there and there != self._locks.hostname:
            self._locks.gone_to(there)
        else:
            self._locks.held(_MOVED)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def starts_again(guest: VmBhyveGuest) -> bool:
    """Say whether vm-bhyve starts a guest again that has failed.  Raises BhyError."""
    return guest.conf().get("on_fault", "shutdown") == "restart"
