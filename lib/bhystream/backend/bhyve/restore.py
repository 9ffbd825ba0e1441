"""`bhyve -r`, started by us and held in its read of the memory.

    new        files of the guest, as far as they are known
    reading    bhyve runs, creates devices, and reads FILE into the VM's memory
    held       it has read all but the last page, and stands (SIGSTOP): its disks, taps
               and consoles are open, and the VM's memory is ours to write
    released   FILE and FILE.kern are whole; it restores devices, then the kernel's
               structures, makes its checkpoint socket, and lets the vCPUs run

How it is held, and that it cannot run before: lastpage.py; on FreeBSD, that the
files are cut in time: freebsd_trace.py.  Of its VM a file speaks as soon as it
is there, of its process before that is bhyve: a shell waits for it, and without
us runs nothing.  bhyve is in a session of its own, so our death wakes it neither
(sys/kern/kern_proc.c, fixjobc_kill(), read).

The VM is made by us, so that it is known whose it is.  A bhyve with a boot ROM
takes over one that is there (VM_REINIT), one without needs it.  Source:
usr.sbin/bhyve/bhyverun.c, do_open(); sys/dev/vmm/vmm_vm.c, vm_reinit(), read.

bhyve makes its socket after the whole restore and before it lets the vCPUs
run.  A node that others left is removed first, so a released one that has no
socket never ran.  Source: bhyverun.c, main(), FreeBSD 15.1; 14 read the same.
Between the socket and the vCPUs bhyve enters capability mode and sets the
clock, and could still end; so it is looked at once more a moment later.
"""

from __future__ import annotations

import calendar
import contextlib
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

from bhystream.backend.bhyve import fpu
from bhystream.backend.bhyve.command import argv, config_file
from bhystream.backend.bhyve.host import (
    HIGHMEM_BASE_GPA,
    LOWMEM_LIMIT_BYTES,
    Host,
    MemoryMap,
    Trace,
    Vm,
)
from bhystream.backend.bhyve.keys import boolean
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.memory import system_memory
from bhystream.backend.bhyve.place import Place, Started
from bhystream.backend.bhyve.snapshot import Files
from bhystream.backend.launch import Child
from bhystream.backend.process import identify
from bhystream.errors import BhyError, GuestError, from_oserror
from bhystream.guest import SLOW_BYTES_PER_SECOND, State
from bhystream.memory.mapping import unmap

_LIMIT_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.002
_MOMENT_S = 0.05  # from the socket to the vCPUs there are a few system calls
# The shell gets a line when it may become bhyve, and the end of the input if we died before.
_GATE = ("/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh")


class TooLateError(GuestError):
    """bhyve had read all the memory before the file was cut: it is not held."""


class Phase(Enum):
    """How far a guest's bhyve has come."""

    NEW = "not started"
    READING = "reading the memory"
    HELD = "held"
    RELEASED = "released"


def rtc_seconds(keys: Mapping[str, str], now: int) -> int:
    """Return what bhyve sets a new guest's clock chip to, of seconds since the Epoch.

    Local time as if it were UTC, unless the configuration says otherwise.
    Source: usr.sbin/bhyve/rtc.c, rtc_time(), FreeBSD 15.1.
    """
    if boolean(keys.get("rtc.use_localtime", "true")) == "false":
        return now
    return calendar.timegm(time.localtime(now))


class Restore:
    """One guest that is started from its files; process and VM are ours until it runs.

    memory: once it is held, the VM's memory, writable, a view for each segment.
    started: the process and the VM, once they are there.  may_have_run: False
    as long as the vCPUs provably never ran.
    """

    def __init__(
        self, host: Host, place: Place, files: Files, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Nothing is started yet.  files: FILE of the guest's size, and FILE.meta.

        on_wait: called often while bhyve is waited for.
        """
        self.phase = Phase.NEW
        self.may_have_run = False
        self.started: Started | None = None
        self.memory: list[memoryview] = []
        self._host = host
        self._name = place.name
        self._who = f"guest {place.name}"
        self._place = place
        self._files = files
        self._last = LastPage(files, place.memory_bytes)
        self._on_wait = on_wait
        self._limit_s = _LIMIT_S + place.memory_bytes / SLOW_BYTES_PER_SECOND
        self._socket = host.run_dir / place.name
        self._child: Child | None = None
        self._vm: Vm | None = None
        self._trace: Trace | None = None
        self._mappings: list[mmap.mmap] = []
        self._node = ""

    # From new to held.

    def hold(self, kern_bytes: int) -> None:
        """Start it, and return when it is held.  kern_bytes: the size of FILE.kern.

        Raises BhyError; TooLateError may be tried again.  Then nothing of it is left.
        """
        try:
            self._require_free()
            self._write_files(kern_bytes)
            self._launch()
            self.phase = Phase.READING
            self._await_maps()
            with self._writing():
                self._last.cut()
            self._let_go_of_trace()
            self._map()
            self._await_read()
            self._stop()
            with self._writing():
                if not self._last.settle(self.memory):
                    raise self._too_late()
            self.phase = Phase.HELD
        except BaseException:
            self.undo()
            raise

    def _require_free(self) -> None:
        """Refuse where the name is in use; remove a socket that nobody listens at."""
        if listens(self._host, self._name):
            raise GuestError(f"{self._who}: a bhyve of that name runs here")
        if self._host.exists(self._name):
            raise GuestError(f"{self._who}: a VM of that name is here; destroy it first")
        try:
            self._socket.unlink(missing_ok=True)
        except OSError as error:
            raise from_oserror(error, f"remove {self._socket}") from None

    @property
    def _config(self) -> Path:
        return Path(f"{self._files.memory}.conf")

    def _write_files(self, kern_bytes: int) -> None:
        text = config_file(self._place.keys)
        with self._writing():
            fd = os.open(self._config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)  # may hold a VNC password
            self._last.arm(kern_bytes)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_oserror(error, f"write {self._files.directory}") from None

    def _launch(self) -> None:
        """Make the VM and the process, write down which they are, and let bhyve begin."""
        self._host.create(self._name)
        self._node = self._host.node_id(self._name)
        self._place.write_started(Started(None, self._node))
        words = argv(self._host.program(), self._name, str(self._config), str(self._files.memory))
        gate, opener = os.pipe()
        try:
            # Our own environment may be that of an operator's --resume.
            self._child = Child(
                [*_GATE, *words], self._place.log_path, self._host.environment(), stdin=gate
            )
            started = Started(identify(self._child.pid, "bhyve"), self._node)
            self._place.write_started(started)
            self.started = started
            self._trace = self._host.trace(self._child.pid)
            os.write(opener, b"\n")
        finally:
            os.close(gate)
            os.close(opener)

    def _await_maps(self) -> None:
        """Let it run until the VM has all its memory, and no further: it has opened its files."""

        def has_memory() -> bool:
            self._on_wait()
            return sum(one.length_bytes for one in self._maps()) == self._place.memory_bytes

        assert self._child is not None and self._trace is not None
        if not self._trace.run_until(has_memory, _LIMIT_S):
            if self._child.has_ended():
                raise self._ended()
            raise GuestError(f"{self._who}: bhyve -r: its VM has no memory after {_LIMIT_S:.0f} s")

    def _let_go_of_trace(self) -> None:
        if self._trace is not None:
            self._trace.let_go()

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

    def _map(self) -> None:
        self._vm = self._host.open_vm(self._name, is_writable=True)
        for one in system_memory(self._vm.maps(), self._who):
            self._mappings.append(self._vm.map(one.gpa, one.length_bytes, is_writable=True))
            self.memory.append(memoryview(self._mappings[-1]))

    def _await_read(self) -> None:
        self._await(
            lambda: self._last.is_read(self.memory), "its memory is not read", self._limit_s
        )

    def _await(self, is_done: Callable[[], bool], what: str, limit_s: float) -> None:
        """Wait for a condition.  Raises GuestError where bhyve has ended, or the time is over."""
        assert self._child is not None
        end = time.monotonic() + limit_s
        while not is_done():
            if self._child.has_ended():
                raise self._ended()
            if time.monotonic() > end:
                raise GuestError(f"{self._who}: bhyve -r: {what} after {limit_s:.0f} s")
            self._on_wait()
            time.sleep(_POLL_S)

    def _ended(self) -> GuestError:
        """Return why it has ended.

        Too late is the empty FILE.kern, where SIGBUS is, and a restore of zeros.
        """
        assert self._child is not None
        is_bus = self.phase is not Phase.RELEASED and self._child.status == -signal.SIGBUS
        is_read = self.phase is Phase.READING and self.memory != []
        if is_bus or (is_read and self._last.is_read_whole(self.memory)):
            return self._too_late()
        return GuestError(f"{self._who}: bhyve -r: {self._child.last_words()}")

    def _too_late(self) -> TooLateError:
        return TooLateError(
            f"{self._who}: bhyve -r had read the memory before it could be held",
            "try again; a host with less to do, or a guest with more memory, gives more time",
        )

    def _stop(self) -> None:
        assert self._child is not None
        if not self._child.stop(_STOP_S):
            if self._child.has_ended():
                raise self._ended()
            raise GuestError(f"{self._who}: bhyve -r cannot be stopped")

    # Held.

    def load(self, kern: Sequence[bytes], states: Sequence[State]) -> None:
        """Give it its state, all but what lets it go.

        kern: FILE.kern in pieces, of the size that hold() was told.  states: of the FPU;
        for none it is not woken.  Raises BhyError; then call undo().
        """
        self.require_held()
        with self._writing():
            self._last.fill(kern)
        if states:
            self._load_fpu(states)
        self.require_held()

    def _load_fpu(self, states: Sequence[State]) -> None:
        assert self._child is not None and self._vm is not None
        # Its own threads run the vCPUs, while its first one goes round in read(2).
        self._child.go_on()
        try:
            fpu.load(self._vm, self.memory[0], states, self._child.has_ended)
        except BhyError:
            if self._child.has_ended():
                raise self._ended() from None
            raise
        self._stop()

    def is_held(self) -> bool:
        """Say whether it stands held still, and lives."""
        return self.phase is Phase.HELD and self._child is not None and not self._child.has_ended()

    def require_held(self) -> None:
        """Raise GuestError, with its last words, where it has ended."""
        if not self.is_held():
            raise self._ended()

    # From held to running.

    def release(self) -> None:
        """Let it go, and return when it runs; it is nobody's from then on.

        Raises BhyError: then may_have_run says whether it may have, and if not,
        nothing of it is left.
        """
        assert self._child is not None
        try:
            if self._child.has_ended():
                raise self._ended()
            self.phase = Phase.RELEASED
            with self._writing():
                self._last.give(self.memory)
            self._child.go_on()
            self._await_socket()
        except BaseException:
            self.undo()
            raise
        self._child.let_go()

    def _await_socket(self) -> None:
        assert self._child is not None
        self._await(lambda: listens(self._host, self._name), "not done", self._limit_s)
        if self._child.ends_within(_MOMENT_S):
            raise self._ended()

    def set_clock(self) -> None:
        """Set the guest's clock chip: its saved time is that of the last access.  Raises BhyError.

        The guest runs on by the clock that it keeps itself; it asks the chip
        when it boots.  Source: sys/amd64/vmm/io/vrtc.c, vrtc_snapshot(), FreeBSD
        15.1, read: base_uptime is not saved.
        """
        if self._vm is not None:
            self._vm.set_rtc(rtc_seconds(self._place.keys, int(time.time())))

    # The end.

    def undo(self) -> None:
        """End what never ran; what may have run is left alone.  Never raises; twice is no error."""
        self.close()
        self._let_go_of_trace()
        if self._child is None:
            self._destroy()
            self._place.forget_started()
            return
        is_released = self.phase is Phase.RELEASED
        if not (is_released and self._socket.exists()):
            self._child.kill()
        if is_released and self._socket.exists():
            self.may_have_run = True
            self._child.let_go()
            return
        self._child.remove_log()
        self._destroy()
        self._place.forget_started()

    def _destroy(self) -> None:
        """Destroy the VM that we have made."""
        with contextlib.suppress(BhyError):
            if self._node and self._host.node_id(self._name) == self._node:
                self._host.destroy(self._name)
        self._node = ""

    def close(self) -> None:
        """Give up the VM and its memory.  Twice is no error."""
        unmap(self.memory, self._mappings)
        self.memory, self._mappings = [], []
        if self._vm is not None:
            self._vm.close()
            self._vm = None
