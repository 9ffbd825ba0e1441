"""The host half of the stand-in, which plays from files what the bhyve backend asks of FreeBSD.

StandinHost implements Host of backend/bhyve/host.py; vm.py implements its VMs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from bhystream import inherited
from bhystream.backend.bhyve.host import VMM_DIR, ClockLayout, Disk, PortWrite
from bhystream.errors import GuestError, from_oserror

from . import node
from .settings import read_settings
from .sysctl import sysctl
from .vm import StandinVm

_POLL_S = 0.0002
_MTU = 1500
# A port, and the value that it has to get.  Source: usr.sbin/bhyve/acpi.h and amd64/pm.c.
_PM1_ENABLE, _ACPI_ON = (0x402, 0x100), (0xB2, 0xA0)
_BITS = {0x402: 0x100, 0xB2: 0xFF}


class StandinTrace:
    """A stand-in that was started.  The stand-in waits before it reads, and is never stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Wait until a condition holds; return False if the process ended or limit_s is over."""
        end = time.monotonic() + limit_s
        while not is_ready():
            if time.monotonic() > end or self._has_ended():
                return False
            time.sleep(_POLL_S)
        return True

    def _has_ended(self) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self._pid, flags) is not None
        except ChildProcessError:  # its supervisor's child
            return not os.path.exists(f"/proc/{self._pid}")

    def write_ports(self, writes: Sequence[PortWrite], limit_s: float) -> bool:
        """Tell a stand-in to connect its power button, if the writes do that."""
        end = time.monotonic() + limit_s
        if not {_PM1_ENABLE, _ACPI_ON} <= {
            (one.port, one.value & _BITS[one.port]) for one in writes
        }:
            return True
        os.kill(self._pid, node.CONNECT)
        while not _catches(self._pid, signal.SIGTERM):
            if time.monotonic() > end or self._has_ended():
                return False
            time.sleep(_POLL_S)
        return True

    def let_go(self) -> None:
        """Do nothing: the stand-in was not stopped."""


class StandinHost:
    """The host that a stand-in's directory plays.

    Every method that reads host.json raises GuestError if that file is invalid.
    """

    kind = "standin"

    def __init__(self, directory: Path) -> None:
        """directory: the value of BHYSEND_VMM_DIR.  Nothing in it is touched."""
        self._directory = directory.absolute()
        self.run_dir = self._directory / "run"

    def environment(self) -> Mapping[str, str]:
        """Return the variables that hypervisors.open_host() needs to find this host again."""
        return {VMM_DIR: str(self._directory)}

    def sysctl(self, name: str) -> str | None:
        """Return host.json's value, else a plausible value, None if the name is not known."""
        return sysctl(self._directory, name)

    def swap_used_bytes(self) -> int:
        """Return the swap in use according to host.json."""
        return read_settings(self._directory).swap_used_bytes

    def free_memory_bytes(self) -> int:
        """Return host.json's value, else the available memory of this system."""
        given = read_settings(self._directory).free_memory_bytes
        if given is not None:
            return given
        return _available_bytes()

    def program(self) -> list[str]:
        """Return the words that run the stand-in."""
        return inherited.program("standin")

    def trace(self, pid: int) -> StandinTrace:
        """Return the trace of a stand-in that was started."""
        return StandinTrace(pid)

    def has_power_button(self, pid: int) -> bool:
        """Say whether a stand-in takes SIGTERM for its guest's power button."""
        return _catches(pid, signal.SIGTERM)

    def program_hash(self) -> str:
        """Return host.json's value, else a hash of the stand-in's own modules."""
        given = read_settings(self._directory).program_hash
        if given is not None:
            return given
        modules = sorted(Path(__file__).parent.glob("*.py"))
        return xxhash.xxh3_128_hexdigest(b"".join(module.read_bytes() for module in modules))

    def can_snapshot(self) -> bool | None:
        """Return host.json's value."""
        return read_settings(self._directory).can_snapshot

    def module_hash(self) -> str:
        """Return host.json's value."""
        return read_settings(self._directory).module_hash

    def clock_layout(self) -> ClockLayout | None:
        """Return where the stand-in's blobs have the clocks; None if host.json says so."""
        from .clocks import CLOCKS  # a dry run starts no guest

        return CLOCKS if read_settings(self._directory).knows_clocks else None

    def disk(self, path: str) -> Disk | None:
        """Return a regular file as a disk, with host.json's fields for its path.

        Returns None if the path is not a readable regular file.
        """
        try:
            found = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
            return None
        disk = Disk(found.st_size, 512, False, os.access(path, os.W_OK))
        return disk._replace(**read_settings(self._directory).disks.get(path, {}))

    def mtu(self, interface: str) -> int | None:
        """Return host.json's MTU of a tap, else 1500; None if there is no such tap."""
        if not self.has_tap(interface):
            return None
        return read_settings(self._directory).mtus.get(interface, _MTU)

    def cpu_vendor(self) -> str:
        """Return host.json's value."""
        return read_settings(self._directory).cpu_vendor

    def exists(self, name: str) -> bool:
        """Say whether the VM's node exists."""
        return node.node_path(self._directory, name).exists()

    def node_id(self, name: str) -> str:
        """Return the node's device and inode, "" if there is no node.

        The node's times would not do: they change with the guest's memory.
        Raises AccessError or InputOutputError if the node cannot be looked at.
        """
        try:
            found = os.stat(node.node_path(self._directory, name))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise from_oserror(error, f"look at VM {name}") from error
        return f"{found.st_dev}:{found.st_ino}"

    def node_status(self, name: str) -> os.stat_result:
        """Return the node's status.  Raises AccessError, InputOutputError, also without a node."""
        try:
            return os.stat(node.node_path(self._directory, name))
        except OSError as error:
            raise from_oserror(error, f"look at VM {name}") from None

    def open_vm(self, name: str, *, is_writable: bool = False) -> StandinVm:
        """Open a VM.  Raises GuestError if there is none, else as StandinVm does."""
        return StandinVm(self._directory, name, is_writable=is_writable)

    def create(self, name: str) -> None:
        """Create an empty VM.  Raises GuestError if the VM exists."""
        node.create(self._directory, name)

    def destroy(self, name: str) -> None:
        """Destroy a VM, unless it is gone.  Raises AccessError, InputOutputError if that fails."""
        try:
            node.destroy(self._directory, name)
        except OSError as error:
            raise from_oserror(error, f"destroy VM {name}") from error

    def mount_null(self, directory: Path) -> None:
        """Bind /dev/null over directory/null, which on Linux needs root.

        Raises GuestError if the mount fails, AccessError or InputOutputError if
        the file cannot be made.
        """
        target = directory / "null"
        try:
            target.touch(0o600)
        except OSError as error:
            raise from_oserror(error, f"make {target}") from error
        error_text = _run("mount", "--bind", "/dev/null", str(target))
        if error_text:
            target.unlink(missing_ok=True)
            raise GuestError(f"cannot mount the null device: {error_text}")

    def unmount_null(self, directory: Path) -> None:
        """Undo mount_null().  Never raises."""
        target = directory / "null"
        _run("umount", str(target))
        try:
            target.unlink(missing_ok=True)
        except OSError:  # the file stays if it is still mounted, or belongs to another user
            return

    def is_memory(self, directory: Path) -> bool:
        """Say whether a directory is on tmpfs.  Source: proc_pid_mounts(5)."""
        try:
            mounts = Path("/proc/mounts").read_text().splitlines()
            path = directory.resolve(strict=True)
        except OSError:
            return False
        best, kind = Path(), ""
        for line in mounts:
            words = line.split()
            point = Path(words[1].encode().decode("unicode_escape"))
            if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
                best, kind = point, words[2]
        return kind == "tmpfs"

    def bridge_of(self, tap: str) -> str | None:
        """Return the bridge that a tap belongs to, None if there is none."""
        try:
            return (self._directory / "net" / tap).read_text().strip() or None
        except OSError:
            return None

    def has_tap(self, tap: str) -> bool:
        """Say whether a tap exists."""
        return (self._directory / "net" / tap).exists()

    def make_tap(self, tap: str, bridge: str | None) -> None:
        """Create a tap.  Raises GuestError if the tap exists or cannot be made."""
        path = self._directory / "net" / tap
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(f"{bridge}\n" if bridge else "")
        except OSError as error:
            raise GuestError(f"cannot create {tap}: {error.strerror}") from error

    def announce(self, cards: Mapping[str, str], process: object) -> None:
        """Write the cards into DIR/announced, one line of JSON for each call.

        Raises GuestError if a tap does not exist, AccessError or InputOutputError if the
        file cannot be written.
        """
        path = self._directory / "announced"
        try:
            with path.open("a") as file:
                file.write(f"{json.dumps(dict(cards))}\n")
        except OSError as error:
            raise from_oserror(error, f"write {path}") from None
        if gone := [tap for tap in cards if not self.has_tap(tap)]:
            raise GuestError(f"{gone[0]}: Device not configured")

    def parent_command(self, pid: int) -> str:
        """Return host.json's value."""
        return read_settings(self._directory).parent_command

    def knows_suspending_lock(self) -> bool:
        """Return host.json's value, by default true: the stand-in's supervisor knows the lock."""
        return read_settings(self._directory).knows_suspending_lock

    def datastores(self) -> Sequence[Path]:
        """Return the one datastore, if this host has vm-bhyve."""
        store = self._directory / "vm"
        return [store] if store.is_dir() else []

    def starter(self) -> Sequence[str]:
        """Return the program that starts a guest of the datastore, if this host has one."""
        program = self._directory / "vm-start"
        return [str(program)] if program.exists() else []

    def manager_finds(self, program: Path) -> bool:
        """Return host.json's value, by default true: nothing changes PATH."""
        return read_settings(self._directory).keeps_path


def _catches(pid: int, number: signal.Signals) -> bool:
    """Say whether a process has a handler for a signal.  Source: proc_pid_status(5), SigCgt."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


def _available_bytes() -> int:
    """Return the memory available without swapping, all memory if the system does not tell."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(*command: str) -> str:
    """Run a command; return "", or the first line of its complaint if the command fails."""
    import subprocess  # few questions need a program

    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return done.stderr.strip().partition("\n")[0].rstrip(".") or f"status {done.returncode}"
