"""Start, watch and end QEMU guests that prove themselves.

    with Guest(Spec()) as guest:                    # QEMU runs, and is killed at the end
        guest.serial.await_ready()                  # booted, area filled
        guest.qmp("stop")                           # connects, runs one command, disconnects
        with Guest(Spec(), incoming=True) as destination:
            ...                                     # move it: guest.qmp_path, guest.ram_path
            destination.serial.await_sweeps(2)      # every byte compared, twice, nothing bad
            assert_unbroken(guest.serial.read(), destination.serial.read())

Each guest has a private directory below /dev/shm with its RAM file, QMP
socket, serial file and QEMU's messages.  The end of the with statement ends the
process and removes the directory, whatever happened inside; if the tests
themselves are killed, QEMU dies with them, and the next guest removes their
directories (an abandoned directory is not locked).

QEMU's command line is one that an administrator would write, with pinned machine
types; the product reads it from /proc/PID/cmdline.  QEMU serves one QMP client
at a time, and the product is to be that client, so nothing here stays connected.

A destination that the product starts is no Guest: watch such a QEMU with
`Serial(path)`, inside `with reaping(qmp_path)`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import platform
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from support.waiting import until

from .build import Images, images
from .qmp import peer_pid, run_command
from .serial import GuestDied, Serial

QEMU = "qemu-system-x86_64"

# microvm has no versions.
MACHINE_TYPES = {"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2", "microvm": "microvm"}

# The kernel prints only its fatal messages, and a panic ends QEMU (reboot=t: microvm can
# reset in no other way).
KERNEL_COMMAND_LINE = (
    "console=ttyS0 loglevel=2 nokaslr mitigations=off nowatchdog panic=-1 oops=panic reboot=t"
)

_PREFIX = "bhysend-test-"
_ABANDONED_S = 60.0
_START_S = 60.0


@dataclass(frozen=True)
class Spec:
    """The description of a guest, the same for a source and its destination.

    machine: "q35", "pc" or "microvm".  ram: the place of RAM, a shared file or
    a shared memfd.  disk: a raw image that both sides open, see make_disk().
    proof: parameters of proof.c without their prefix, for example
    {"rate": 64}.  extra: further QEMU arguments.
    """

    machine: Literal["q35", "pc", "microvm"] = "q35"
    vcpus: int = 1
    memory_mib: int = 512
    ram: Literal["file", "memfd"] = "file"
    disk: Path | None = None
    name: str = "proof"
    proof: Mapping[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    def command_line(self) -> str:
        """Return the kernel's command line."""
        proof = dict(self.proof)
        if self.disk is not None:
            proof.setdefault("disk", 1)
        words = [KERNEL_COMMAND_LINE, *(f"proof.{k}={v}" for k, v in proof.items())]
        # Without HPET and PM timer Linux must measure the TSC against the PIT in 30 ms.  On a busy
        # host Linux fails to, and then waits forever for a tick: so we state the TSC's rate.
        if self.machine == "microvm" and platform.machine() == "x86_64":
            words.append(f"tsc_early_khz={tsc_khz()}")
        return " ".join(words)

    def argv(
        self, booted: Images, *, ram_path: Path, qmp_path: Path, serial_path: Path
    ) -> list[str]:
        """Return QEMU's command line for this guest with these host resources."""
        size = f"{self.memory_mib}M"
        backend = f"memory-backend-file,id=ram0,size={size},mem-path={ram_path},share=on"
        if self.ram == "memfd":
            backend = f"memory-backend-memfd,id=ram0,size={size},share=on"
        argv = [QEMU, "-name", self.name]
        argv += ["-machine", f"{MACHINE_TYPES[self.machine]},accel=tcg,memory-backend=ram0"]
        argv += ["-cpu", "qemu64", "-smp", str(self.vcpus), "-m", size, "-object", backend]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
        argv += ["-no-reboot", "-qmp", f"unix:{qmp_path},server=on,wait=off"]
        argv += ["-chardev", f"file,id=serial0,path={serial_path}", "-serial", "chardev:serial0"]
        if self.disk is not None:
            device = "virtio-blk-device" if self.machine == "microvm" else "virtio-blk-pci"
            argv += ["-drive", f"file={self.disk},if=none,id=disk0,format=raw"]
            argv += ["-device", f"{device},drive=disk0"]
        argv += ["-kernel", str(booted.kernel), "-initrd", str(booted.initramfs)]
        return [*argv, "-append", self.command_line(), *self.extra]


def make_disk(path: Path, mib: int = 32) -> Path:
    """Make an empty raw image for Spec.disk and return its path."""
    with path.open("wb") as file:
        file.truncate(mib << 20)
    return path


@functools.cache
def tsc_khz() -> int:
    """Return the rate of this host's time stamp counter, which is the guest's under TCG.

    The rate is measured once, to the MHz, so that a source and its destination
    get the same value.  Only for x86-64 hosts.  The kernel does not tell the rate:
    the MHz in /proc/cpuinfo may be the momentary ones.
    """
    # rdtsc; shl $32,%rdx; or %rdx,%rax; ret
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    start_ns, start = time.monotonic_ns(), read_tsc()
    time.sleep(0.05)  # the length of the measurement, not a wait for anything
    end_ns, end = time.monotonic_ns(), read_tsc()
    mhz: int = round((end - start) * 1000 / (end_ns - start_ns))
    return mhz * 1000


class Guest:
    """One QEMU process with a proving guest, and all its files on this host.

    incoming: start as a destination, `-incoming defer`, and load no state yet.
    ram_path: the path of the RAM file, which is removed at the end; None for one
    in the private directory.  Raises BuildError if the guest cannot be made here.

    Start the guest in a thread that outlives it: the kernel kills QEMU when that
    thread ends.
    """

    def __init__(
        self, spec: Spec | None = None, *, incoming: bool = False, ram_path: Path | None = None
    ) -> None:
        self.spec = spec or Spec()
        self._images = images()
        self._incoming = incoming
        self._process: subprocess.Popen[bytes] | None = None
        self.directory, self._lock = _private_directory()
        self._ram_path = ram_path or self.directory / "ram"
        self.qmp_path = self.directory / "qmp.sock"
        self.serial = Serial(self.directory / "serial.log", self._why_dead)

    def __enter__(self) -> Guest:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def argv(self) -> list[str]:
        """Return QEMU's command line."""
        argv = self.spec.argv(
            self._images,
            ram_path=self._ram_path,
            qmp_path=self.qmp_path,
            serial_path=self.serial.path,
        )
        return [*argv, "-incoming", "defer"] if self._incoming else argv

    @property
    def pid(self) -> int:
        """Return QEMU's process id."""
        if self._process is None:
            raise GuestDied("the guest was not started")
        return self._process.pid

    @property
    def ram_path(self) -> Path:
        """Return the RAM file's path; a memfd's below /proc is valid while QEMU lives."""
        if self.spec.ram == "file":
            return self._ram_path
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(entry).startswith("/memfd:memory-backend-memfd"):
                    return entry
        raise LookupError(f"process {self.pid} has no memfd for its RAM")

    def start(self) -> None:
        """Start QEMU and wait until it answers on its QMP socket."""
        with (self.directory / "stderr").open("wb") as messages:
            # setpriv(1) executes QEMU, so the process id and the command line are QEMU's own.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
            )
        until(self._answers, "an answer of QEMU", _START_S)

    def close(self) -> None:
        """Kill QEMU and remove all files of the guest.  May be called again."""
        self.kill()
        if self._lock >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._ram_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def kill(self) -> None:
        """Kill QEMU, as a power failure of the host does; the files stay until close()."""
        if self._process is not None and self._process.returncode is None:
            # After a failed exec there is no session, and after a reaped process no group.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command on a connection of its own and return its result.

        Raises QmpError if QEMU refuses the command.
        """
        return run_command(self.qmp_path, command, arguments)

    def status(self) -> str:
        """Return QEMU's run state: running, paused, postmigrate, inmigrate ..."""
        status: str = self.qmp("query-status")["status"]
        return status

    def await_migration(self, deadline_s: float = _START_S) -> None:
        """Wait until the migration, outgoing or incoming, has completed."""
        info: dict[str, Any] = {}

        def has_completed() -> bool:
            nonlocal info
            info = self.qmp("query-migrate")
            if info.get("status") in ("failed", "cancelled"):
                raise GuestDied(f"migration: {info}")
            return info.get("status") == "completed"

        until(has_completed, lambda: f"the end of the migration: {info}", deadline_s)

    def _answers(self) -> bool:
        """Say whether QEMU answers on its QMP socket.  Raises GuestDied."""
        ended = self._why_dead()
        if ended is not None:
            raise GuestDied(ended)
        with suppress(FileNotFoundError, ConnectionRefusedError):
            self.qmp("query-status")
            return True
        return False

    def _why_dead(self) -> str | None:
        if self._process is None:
            return "QEMU was not started"
        status = self._process.poll()
        if status is None:
            return None
        messages = (self.directory / "stderr").read_text(errors="replace").strip()
        return f"QEMU ended with status {status}: {messages or 'no message'}"


@contextmanager
def reaping(qmp_path: Path) -> Iterator[None]:
    """At the end, kill the QEMU that then listens on a socket: one that the product started."""
    try:
        yield
    finally:
        with suppress(FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
            pid = peer_pid(qmp_path)
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _START_S)  # readable when it has ended
            finally:
                os.close(pidfd)


def _private_directory() -> tuple[Path, int]:
    """Make a directory for one guest; return it with a descriptor that holds its lock."""
    base = Path("/dev/shm")
    if not os.access(base, os.W_OK | os.X_OK):
        base = Path(tempfile.gettempdir())
    remove_abandoned(base)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return directory, fd


def remove_abandoned(base: Path) -> None:
    """Remove our directories whose owner has ended: old ones that no process has locked."""
    for directory in base.glob(_PREFIX + "*"):
        try:
            if time.time() - directory.stat().st_ctime < _ABANDONED_S:
                continue  # perhaps made a moment ago, and not locked yet
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(fd)
