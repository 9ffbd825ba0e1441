"""`bhyve -r`, started by bhyrecv and made to wait in its read of the memory.

    new        the guest's files exist, as far as they are known
    reading    bhyve runs, creates devices, and reads FILE into the VM's memory
    waiting    bhyve has read all but the last page, and is stopped (SIGSTOP): its disks,
               taps and consoles are open, and bhyrecv may write the VM's memory
    released   FILE and FILE.kern are whole; bhyve restores devices, then the kernel's
               structures, makes its checkpoint socket, and lets the vCPUs run

This module leads from new to waiting; waitingrestore.py has the rest.

lastpage.py says how bhyve is made to wait, and why it cannot run the guest
before.  On FreeBSD, freebsd_trace.py makes sure that the files are cut in time.
A file names the VM as soon as the VM exists, and the process before it becomes
bhyve: the process is first a shell that waits for bhyrecv's word, and ends if
bhyrecv dies.  bhyve is in a session of its own, so the death of bhyrecv does not
continue a stopped bhyve (sys/kern/kern_proc.c, fixjobc_kill(), read).

bhyrecv makes the VM, so that the VM's owner is known.  A bhyve with a boot ROM
takes over an existing VM (VM_REINIT); a bhyve without one needs an existing VM.
Source: usr.sbin/bhyve/bhyverun.c, do_open(); sys/dev/vmm/vmm_vm.c, vm_reinit(), read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bhystream import durable
from bhystream.backend.adopted import Adopted
from bhystream.backend.bhyve import lastpage, powerbutton
from bhystream.backend.bhyve.command import argv, config_file
from bhystream.backend.bhyve.host import (
    HIGHMEM_BASE_GPA,
    LOWMEM_LIMIT_BYTES,
    Host,
    MemoryMap,
    Trace,
)
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.restoredguest import RestoredGuest, Started
from bhystream.backend.bhyve.restoring import Bhyve, Mapped, map_memory, writing
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.bhyve.vmstart import VmStart
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.files import is_ours_alone
from bhystream.backend.launch import Child
from bhystream.backend.process import identify
from bhystream.errors import AccessError, BhyError, GuestError, from_oserror
from bhystream.guest import SLOW_BYTES_PER_SECOND
from bhystream.inherited import GATE

_LIMIT_S = 60.0
_CONNECT_S = 10.0  # a few ms, if nothing is wrong


@dataclass(frozen=True)
class Supervision:
    """How vm-bhyve comes to supervise a guest that is restored.

    start: returns what starts the guest.  adapt: returns the guest with the configuration for
    which vm-bhyve calls bhyve, whose arguments it gets; raises IncompatibleError if that is
    another machine than the guest's.
    """

    start: Callable[[], VmStart]
    adapt: Callable[[Sequence[str]], RestoredGuest]


def supervision(
    host: Host, guest: RestoredGuest, adapt: Callable[[Sequence[str]], RestoredGuest]
) -> Supervision | None:
    """Return how vm-bhyve comes to supervise a guest, None if vm-bhyve does not have the guest."""
    locks = guest.locks
    words = host.starter() if locks else ()
    if locks is None or not words:
        return None
    return Supervision(lambda: VmStart(host, words, locks, guest.vm_start, guest.log_path), adapt)


class Restore:
    """One guest that is to be started from its files.

    limit_s: how many seconds bhyve may take for each of its steps.
    """

    def __init__(
        self,
        host: Host,
        guest: RestoredGuest,
        files: Files,
        on_wait: Callable[[], None] = lambda: None,
        supervision: Supervision | None = None,
    ) -> None:
        """Start nothing yet.

        files: FILE, in the guest's size, and FILE.meta must exist.  on_wait:
        called often during waits for bhyve.  supervision: None if the guest is to have no
        supervisor.
        """
        self._host = host
        self._supervision = supervision
        self._name = guest.name
        self._who = f"guest {guest.name}"
        self._guest = guest
        self._files = files
        self._on_wait = on_wait
        self.limit_s = _LIMIT_S + guest.memory_bytes / SLOW_BYTES_PER_SECOND

    def hold(self, kern_bytes: int) -> WaitingRestore:
        """Start bhyve, and return it when it waits.  kern_bytes: the size of FILE.kern.

        Raises BhyError if that fails; then neither the process nor the VM is left.
        After a TooLateError the caller may try again.
        """
        with ExitStack() as undo:
            undo.callback(self._guest.forget_started)
            self._require_free()
            start = self._begin(undo)
            last = self._write_files(kern_bytes)
            bhyve, started, trace = self._launch(undo, start)
            self._await_maps(bhyve, trace)
            with self._writing():
                last.cut()
            is_connected = self._connect(trace)
            trace.let_go()
            mapped = self._map(undo)
            views = mapped.views
            self._await_read(bhyve, last, views)
            self._stop(bhyve, last, views)
            with self._writing():
                if not last.settle(views):
                    raise bhyve.too_late()
            return WaitingRestore(
                self._host,
                self._guest,
                bhyve,
                started,
                mapped,
                last,
                self.limit_s,
                undo.pop_all(),
                is_connected=is_connected,
            )

    def _require_free(self) -> None:
        """Raise GuestError if the name is in use; remove a socket at which nobody listens."""
        if listens(self._host, self._name):
            raise GuestError(f"{self._who}: a bhyve of that name runs here")
        if self._host.exists(self._name):
            raise GuestError(f"{self._who}: a VM of that name is here; destroy it first")
        path = self._host.run_dir / self._name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise from_oserror(error, f"remove {path}") from None

    @property
    def _config(self) -> Path:
        return Path(f"{self._files.memory}.conf")

    def _write_files(self, kern_bytes: int) -> LastPage:
        text = config_file(self._guest.keys)
        with self._writing():
            fd = durable.create(self._config)
            with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)  # may contain a VNC password
            return lastpage.arm(self._files, self._guest.memory_bytes, kern_bytes)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._files.directory)

    def _begin(self, undo: ExitStack) -> VmStart | None:
        """Let vm-bhyve start the guest, if it is to supervise it; its words win over the record's.

        Raises BhyError, IncompatibleError of it if vm-bhyve would start another guest.
        """
        if self._supervision is None:
            return None
        undo.callback(self._guest.end_supervisor)
        start = self._supervision.start()
        undo.callback(start.undo)
        start.begin(self._on_wait)
        self._guest = self._supervision.adapt(start.arguments)
        return start

    def _launch(self, undo: ExitStack, start: VmStart | None) -> tuple[Bhyve, Started, Trace]:
        """Make the VM and the process, record them, and let bhyve begin.

        undo: gets the callbacks that end both.  start: vm-bhyve's, None without a supervisor.
        """
        self._host.create(self._name)
        node = self._host.node_id(self._name)
        undo.callback(self._destroy, node)
        if not is_ours_alone(self._host.node_status(self._name)):
            raise AccessError(
                f"{self._who}: other users may open the VM's node, which has all of its memory;"
                " take back the rule that opens it (devfs.rules(5))"
            )
        self._guest.write_started(Started(None, node))
        words = argv(self._host.program(), self._name, str(self._config), str(self._files.memory))
        with ExitStack() as opened:
            child: Child | Adopted
            if start is None:
                child, let_begin = self._gated(words, opened)
                undo.callback(child.remove_log)
            else:
                child, let_begin = start.child, lambda: start.become(words)
            undo.callback(child.kill)
            started = Started(identify(child.pid, "bhyve"), node)
            self._guest.write_started(started)
            trace = self._host.trace(child.pid)
            undo.callback(trace.let_go)
            let_begin()
        return Bhyve(self._who, child, self._on_wait), started, trace

    def _gated(self, words: list[str], opened: ExitStack) -> tuple[Child, Callable[[], object]]:
        """Start a shell that becomes bhyve; return it, and what lets it do that.

        opened: closes what is open for that.
        """
        gate, opener = os.pipe()
        opened.callback(os.close, gate)
        opened.callback(os.close, opener)
        # Not our own environment, which may be that of an operator's --resume.
        child = Child([*GATE, *words], self._guest.log_path, self._host.environment(), stdin=gate)
        return child, lambda: os.write(opener, b"\n")

    def _destroy(self, node: str) -> None:
        """Destroy the VM that _launch() made, unless it is gone already."""
        with contextlib.suppress(BhyError):
            if node and self._host.node_id(self._name) == node:
                self._host.destroy(self._name)

    def _await_maps(self, bhyve: Bhyve, trace: Trace) -> None:
        """Let bhyve run until the VM has all its memory, and no further.

        By then bhyve has opened its files.  Raises GuestError if it has ended or takes too long.
        """

        def has_memory() -> bool:
            self._on_wait()
            return sum(one.length_bytes for one in self._maps()) == self._guest.memory_bytes

        if not trace.run_until(has_memory, _LIMIT_S):
            if bhyve.child.has_ended():
                raise bhyve.ended(bhyve.found_no_kern)
            raise GuestError(f"{self._who}: bhyve -r: its VM has no memory after {_LIMIT_S:.0f} s")

    def _maps(self) -> list[MemoryMap]:
        """Return the maps of system memory that the VM has by now."""
        try:
            vm = self._host.open_vm(self._name)
        except GuestError:
            return []  # bhyve has ended, which _await_maps() sees
        try:
            maps = vm.maps()
        finally:
            vm.close()
        return [m for m in maps if m.gpa < LOWMEM_LIMIT_BYTES or m.gpa >= HIGHMEM_BASE_GPA]

    def _connect(self, trace: Trace) -> bool:
        """Connect the guest's power button, if it had one; say whether that was done."""
        if not self._guest.has_power_button:
            return True
        return trace.write_ports(powerbutton.CONNECT, _CONNECT_S)

    def _map(self, undo: ExitStack) -> Mapped:
        """Map the VM's memory.  undo: gets the callback that releases it."""
        mapped = map_memory(self._host, self._name, self._who)
        undo.callback(mapped.close)
        return mapped

    def _await_read(self, bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> None:
        bhyve.until(
            lambda: last.is_read(memory),
            "its memory is not read",
            self.limit_s,
            lambda: _was_too_fast(bhyve, last, memory),
        )

    def _stop(self, bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> None:
        bhyve.stop(lambda: _was_too_fast(bhyve, last, memory))


def _was_too_fast(bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> bool:
    """Say whether bhyve read all of FILE, and so found an empty FILE.kern or restored zeros."""
    return bhyve.found_no_kern() or last.is_read_whole(memory)
