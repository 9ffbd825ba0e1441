"""Run a guest as bhyve does: the same options, exit statuses and order of events.

The exit statuses are those of bhyve(8): 0 if the guest rebooted (SIGUSR1 makes
the guest reboot); 1 if the guest powered off (SIGTERM presses its power button),
the command line is wrong, or a snapshot cannot be restored; 4 for an error; 5 if
the guest was suspended; 65 if kernel structures, 71 if the socket or the clock of
a restored guest failed.

SIGPIPE ends the stand-in, as it ends bhyve: a FIFO that the stand-in writes
into must keep a reader.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, VMM_DIR, MemoryMap
from bhystream.errors import BhyError, GuestError, UsageError
from bhystream.guest import PAGE_BYTES

from . import node
from .checkpoint import CheckpointServer
from .config import Config, parse
from .devices import make_devices
from .gate import Gate
from .guest import Guest, boot_parameters
from .restore import EX_DATAERR, RestoreError, Snapshot, load_devices, load_kernel, load_memory
from .saving import abort, complain
from .settings import read_settings

REBOOTED = 0
POWERED_OFF = 1
ERROR = 4
SUSPENDED = 5
EX_OSERR = 71

_WATCH_S = 0.1
_MEM_F_INCORE, _MEM_F_WIRED = 0x01, 0x02  # vmmapi.h
_FBUF_GPA, _FBUF_BYTES = 0xC0000000, 16 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a guest to its end; return the exit status.

    argv: without the program's name; None stands for the process's own.
    """
    directory = os.environ.get(VMM_DIR)
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        if not directory:
            raise UsageError(f"{VMM_DIR} is not set")
        if config.is_set("config.dump"):
            sys.stdout.writelines(f"{key}={config.get(key)}\n" for key in sorted(config.keys))
            return 1
        snapshot = Snapshot(config.snapshot) if config.snapshot is not None else None
    except UsageError as error:
        sys.stderr.write(f"bhyve: {error}\n{error.hint}" if str(error) else error.hint)
        return 0 if not str(error) else 1
    except RestoreError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    except BhyError as error:
        sys.stderr.write(f"{error}\n")
        return ERROR
    return Machine(Path(directory).absolute(), config, snapshot).run()


class Machine:
    """One run of a guest, from its VM to its exit status."""

    def __init__(self, directory: Path, config: Config, snapshot: Snapshot | None) -> None:
        self._directory = directory
        self._config = config
        self._snapshot = snapshot
        self._name = config.name or (snapshot.name if snapshot else "")
        self._exits: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._is_suspended = False

    def run(self) -> int:
        """Make or restore the guest, let it run, and return the exit status."""
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if self._snapshot is None:
            self._connect()
        else:
            signal.signal(node.CONNECT, self._connect)
        signal.signal(signal.SIGUSR1, lambda *_: self._exits.put(REBOOTED))
        try:
            guest = self._build()
            server = self._prepare(guest)
        except (BhyError, OSError) as error:
            # An error leaves the VM: only the end of a guest that ran destroys it, as in bhyve.
            sys.stderr.write(f"{error}\n")
            return error.exit_status if isinstance(error, RestoreError) else ERROR
        run_guest = guest.resume_vcpus if self._snapshot else guest.start_vcpus
        with server.quiet():
            if not guest.can_enter:
                complain("vm exit: invalid guest state")
                abort()
            run_guest()
        return self._watch(guest)

    def _connect(self, *_: object) -> None:
        """Let SIGTERM press the guest's power button: the guest has switched ACPI on.

        A guest that is restored has lost the button, as in bhyve.
        """
        if "no-button" not in read_settings(self._directory).fail:
            signal.signal(signal.SIGTERM, lambda *_: self._exits.put(POWERED_OFF))

    def _build(self) -> Guest:
        """Make the VM, its memory and its devices; no vCPU runs yet.

        NAME.map shows the progress: its list of maps is written when the memory
        is mapped, and is_active is set when the devices are made and the vCPUs
        exist, suspended.
        """
        if not self._name:
            raise UsageError("virtual machine name must be given")
        memsize, topology = self._config.memsize_bytes(), self._config.topology()
        self._take_vm()
        if self._snapshot:
            memsize, topology = self._restored_size(self._snapshot)
        has_log = read_settings(self._directory).dirty_log
        memory = node.Memory(self._directory, self._name, memsize, has_log=has_log)
        is_wired = self._config.is_set("memory.wired")
        maps = node.memory_maps(memsize, is_wired=is_wired, devices=self._device_memory())
        mapped = node.Map(maps, topology, is_active=False)
        node.write_map(self._directory, self._name, mapped)
        gate = Gate()
        devices = make_devices(self._config, memory, gate, self._directory)
        ncpus = topology[0] * topology[1] * topology[2]
        guest = Guest(memory, devices, gate, ncpus)
        if self._snapshot is not None:
            guest.hold_vcpus()
        node.write_map(self._directory, self._name, mapped._replace(is_active=True))
        return guest

    def _restored_size(self, snapshot: Snapshot) -> tuple[int, tuple[int, int, int]]:
        """Return the memory size in bytes and the topology of a restored guest.

        The snapshot's memory size and number of vCPUs override the
        configuration's.  Raises RestoreError if either of them is invalid.
        """
        if snapshot.ncpus < 1:
            raise RestoreError(f"Invalid guest vCPUs ({snapshot.ncpus})")
        if snapshot.memsize_bytes < 1 or snapshot.memsize_bytes % PAGE_BYTES:
            raise RestoreError("Unable to setup memory (22)", ERROR)
        topology = self._config.topology()
        if topology[0] * topology[1] * topology[2] != snapshot.ncpus:
            topology = (snapshot.ncpus, 1, 1)
        return snapshot.memsize_bytes, topology

    def _take_vm(self) -> None:
        """Create the VM, or take the VM that a loader made.

        Raises GuestError if the VM cannot be taken: a VM whose vCPUs were
        activated and not stopped by the guest itself is refused.
        Source: sys/dev/vmm/vmm_vm.c, vm_reinit(), FreeBSD 15.1, read.
        """
        rom = self._config.get("bootrom") or self._config.get("lpc.bootrom")
        if not node.node_path(self._directory, self._name).exists():
            if not rom:
                raise GuestError("virtual machine cannot be booted")
            node.create(self._directory, self._name)
        elif node.read_map(self._directory, self._name).is_active:
            what = "vm_openf" if rom else "could not activate CPU 0"
            raise GuestError(f"{what}: Device busy")
        if rom and not Path(rom).is_file():
            raise GuestError(f"Error opening bootrom {rom!r}: No such file or directory")

    def _device_memory(self) -> list[MemoryMap]:
        found = []
        rom = self._config.get("bootrom") or self._config.get("lpc.bootrom")
        if rom:
            length = -(-max(os.path.getsize(rom), 1) // 4096) * 4096
            found.append(MemoryMap(HIGHMEM_BASE_GPA - length, 1, 0, length, 5, False))
        if any(kind == "fbuf" for kind, _ in self._config.devices()):
            found.append(MemoryMap(_FBUF_GPA, 2, 0, _FBUF_BYTES, 3, False))
        return found

    def _prepare(self, guest: Guest) -> CheckpointServer:
        """Fill the guest and bind the checkpoint socket.  No vCPU runs until run() starts it."""
        if self._snapshot is None:
            guest.boot(boot_parameters(self._config, guest.ncpus, guest.memory.npages))
            guest.prepare()
            return self._serve(guest)
        fail = read_settings(self._directory).fail
        self._restore(guest, self._snapshot, fail)
        server = self._serve(guest)
        self._snapshot.close()
        if "restore-late" in fail:
            # As fast as bhyve's exit(3): the end of an interpreter takes longer than the moment
            # for which bhyrecv looks once more.
            sys.stderr.write("Unable to restore time: Invalid argument\n")
            os._exit(EX_OSERR)
        return server

    def _restore(self, guest: Guest, snapshot: Snapshot, fail: Sequence[str]) -> None:
        """Load memory, devices and kernel structures, in this order."""
        if "restore-early" in fail:
            raise RestoreError("Failed to pause PCI device state.")
        if "slow-read" in fail:
            self._await_release(guest)
        load_memory(snapshot, guest, look=lambda: self._look(guest), fail=fail)
        load_devices(snapshot, guest)
        load_kernel(snapshot, guest)
        guest.prepare()
        if "restore" in fail:
            raise RestoreError("Failed to restore vhpet: Invalid argument", EX_DATAERR)
        if "slow-restore" in fail:
            self._await_release(guest)

    def _await_release(self, guest: Guest) -> None:
        while not (self._directory / "release").exists():
            self._look(guest)
            time.sleep(0.005)

    def _look(self, guest: Guest) -> None:
        """Raise GuestError if the VM is gone.

        bhyve's suspended vCPU threads notice that too: they try VM_RUN every millisecond.
        """
        if not guest.memory.is_current():
            raise GuestError("vm_run error -1, errno 6")

    def _serve(self, guest: Guest) -> CheckpointServer:
        flags = _MEM_F_WIRED if self._config.is_set("memory.wired") else 0
        flags |= _MEM_F_INCORE if self._config.is_set("memory.guest_in_core") else 0
        server = CheckpointServer(
            self._directory,
            self._name,
            guest,
            memflags=flags,
            end=lambda: self._end_suspended(guest),
        )
        try:
            server.start()
        except OSError as error:
            what = f"Failed to bind socket: {error}\nFailed to start checkpoint thread"
            raise RestoreError(what, EX_OSERR) from None
        return server

    def _end_suspended(self, guest: Guest) -> None:
        """End the process inside the handler, as bhyve does: the client gets EOF and no reply."""
        # Without this flag, _watch() would report that another process destroyed the VM.
        self._is_suspended = True
        self._destroy(guest)
        os._exit(SUSPENDED)

    def _watch(self, guest: Guest) -> int:
        """Wait until the guest ends or another process destroys the VM; return the exit status.

        bhyve's vCPU threads notice by VM_RUN that the VM is gone, but not while a
        checkpoint has paused the threads.  The stand-in ends even then if the
        host's vmm directory is gone.
        """
        while True:
            try:
                status = self._exits.get(timeout=_WATCH_S)
            except queue.Empty:
                if guest.memory.is_current() or self._is_suspended:
                    continue
                if guest.is_paused and (self._directory / "vmm").is_dir():
                    continue
                sys.stderr.write("vm_run: Device not configured\n")
                return ERROR
            self._destroy(guest)
            return status

    def _destroy(self, guest: Guest) -> None:
        """Destroy the VM, unless the VM is gone: its name may belong to another VM by now."""
        if guest.memory.is_current():
            node.destroy(self._directory, self._name)


if __name__ == "__main__":
    STATUS = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
