"""`bhyve -r`, started by us and held in its read of the memory.

    new        files of the guest, as far as they are known
    reading    bhyve runs, creates devices, and reads FILE into the VM's memory
    held       it has read all but the last page, and stands (SIGSTOP): its disks, taps
               and consoles are open, and the VM's memory is ours to write
    released   FILE and FILE.kern are whole; it restores devices, then the kernel's
               structures, makes its checkpoint socket, and lets the vCPUs run

Here is what leads from new to held; heldrestore.py has the rest.

How it is held, and that it cannot run before: lastpage.py; on FreeBSD, that the
files are cut in time: freebsd_trace.py.  Of its VM a file speaks as soon as it
is there, of its process before that is bhyve: a shell waits for it, and without
us runs nothing.  bhyve is in a session of its own, so our death wakes it neither
(sys/kern/kern_proc.c, fixjobc_kill(), read).

The VM is made by us, so that it is known whose it is.  A bhyve with a boot ROM
takes over one that is there (VM_REINIT), one without needs it.  Source:
usr.sbin/bhyve/bhyverun.c, do_open(); sys/dev/vmm/vmm_vm.c, vm_reinit(), read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bhystream.backend.bhyve import lastpage
from bhystream.backend.bhyve.command import argv, config_file
from bhystream.backend.bhyve.heldrestore import HeldRestore
from bhystream.backend.bhyve.host import (
    HIGHMEM_BASE_GPA,
    LOWMEM_LIMIT_BYTES,
    Host,
    MemoryMap,
    Trace,
)
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.place import Place, Started
from bhystream.backend.bhyve.restoring import Bhyve, Mapped, map_memory, writing
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.launch import Child
from bhystream.backend.process import identify
from bhystream.errors import BhyError, GuestError, from_oserror
from bhystream.guest import SLOW_BYTES_PER_SECOND

_LIMIT_S = 60.0
# The shell gets a line when it may become bhyve, and the end of the input if we died before.
_GATE = ("/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh")


class Restore:
    """One guest that is to be started from its files."""

    def __init__(
        self, host: Host, place: Place, files: Files, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Nothing is started.  files: FILE of the guest's size, and FILE.meta.

        on_wait: called often while bhyve is waited for.
        """
        self._host = host
        self._name = place.name
        self._who = f"guest {place.name}"
        self._place = place
        self._files = files
        self._on_wait = on_wait
        self._limit_s = _LIMIT_S + place.memory_bytes / SLOW_BYTES_PER_SECOND

    def hold(self, kern_bytes: int) -> HeldRestore:
        """Start it, and return it held.  kern_bytes: the size of FILE.kern.

        Raises BhyError; TooLateError may be tried again.  Then nothing of it is left.
        """
        with ExitStack() as undo:
            undo.callback(self._place.forget_started)
            self._require_free()
            last = self._write_files(kern_bytes)
            bhyve, started, trace = self._launch(undo)
            self._await_maps(bhyve, trace)
            with self._writing():
                last.cut()
            trace.let_go()
            mapped = self._map(undo)
            views = mapped.views
            self._await_read(bhyve, last, views)
            self._stop(bhyve, last, views)
            with self._writing():
                if not last.settle(views):
                    raise bhyve.too_late()
            return HeldRestore(
                self._host,
                self._place,
                bhyve,
                started,
                mapped,
                last,
                self._limit_s,
                undo.pop_all(),
            )

    def _require_free(self) -> None:
        """Refuse where the name is in use; remove a socket that nobody listens at."""
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
        text = config_file(self._place.keys)
        with self._writing():
            fd = os.open(self._config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)  # may hold a VNC password
            return lastpage.arm(self._files, self._place.memory_bytes, kern_bytes)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._files.directory)

    def _launch(self, undo: ExitStack) -> tuple[Bhyve, Started, Trace]:
        """Make the VM and the process, write down which they are, and let bhyve begin.

        undo: ends both.
        """
        self._host.create(self._name)
        node = self._host.node_id(self._name)
        undo.callback(self._destroy, node)
        self._place.write_started(Started(None, node))
        words = argv(self._host.program(), self._name, str(self._config), str(self._files.memory))
        gate, opener = os.pipe()
        try:
            # Our own environment may be that of an operator's --resume.
            child = Child(
                [*_GATE, *words], self._place.log_path, self._host.environment(), stdin=gate
            )
            undo.callback(child.remove_log)
            undo.callback(child.kill)
            started = Started(identify(child.pid, "bhyve"), node)
            self._place.write_started(started)
            trace = self._host.trace(child.pid)
            undo.callback(trace.let_go)
            os.write(opener, b"\n")
        finally:
            os.close(gate)
            os.close(opener)
        return Bhyve(self._who, child, self._on_wait), started, trace

    def _destroy(self, node: str) -> None:
        """Destroy the VM that we have made."""
        with contextlib.suppress(BhyError):
            if node and self._host.node_id(self._name) == node:
                self._host.destroy(self._name)

    def _await_maps(self, bhyve: Bhyve, trace: Trace) -> None:
        """Let it run until the VM has all its memory, and no further: it has opened its files."""

        def has_memory() -> bool:
            self._on_wait()
            return sum(one.length_bytes for one in self._maps()) == self._place.memory_bytes

        if not trace.run_until(has_memory, _LIMIT_S):
            if bhyve.child.has_ended():
                raise bhyve.ended(bhyve.found_no_kern)
            raise GuestError(f"{self._who}: bhyve -r: its VM has no memory after {_LIMIT_S:.0f} s")

    def _maps(self) -> list[MemoryMap]:
        """Return what there is of the system memory's maps."""
        try:
            vm = self._host.open_vm(self._name)
        except GuestError:
            return []  # it has ended, which is seen next
        try:
            maps = vm.maps()
        finally:
            vm.close()
        return [m for m in maps if m.gpa < LOWMEM_LIMIT_BYTES or m.gpa >= HIGHMEM_BASE_GPA]

    def _map(self, undo: ExitStack) -> Mapped:
        """Return the VM's memory.  undo: gives it up."""
        mapped = map_memory(self._host, self._name, self._who)
        undo.callback(mapped.close)
        return mapped

    def _await_read(self, bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> None:
        bhyve.until(
            lambda: last.is_read(memory),
            "its memory is not read",
            self._limit_s,
            lambda: _was_too_fast(bhyve, last, memory),
        )

    def _stop(self, bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> None:
        bhyve.stop(lambda: _was_too_fast(bhyve, last, memory))


def _was_too_fast(bhyve: Bhyve, last: LastPage, memory: Sequence[memoryview]) -> bool:
    """Say whether it had read all: it found an empty FILE.kern, or restored zeros."""
    return bhyve.found_no_kern() or last.is_read_whole(memory)
