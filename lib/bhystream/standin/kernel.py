"""The host half of the stand-in: what the bhyve backend asks of FreeBSD, from files.

StandinHost keeps the protocol of backend/bhyve/host.py; its VMs are vm.py's.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bhystream import inherited
from bhystream.backend.bhyve.host import VMM_DIR, Disk
from bhystream.errors import GuestError, from_oserror

from . import node
from .settings import read_settings
from .sysctl import sysctl
from .vm import StandinVm

_POLL_S = 0.0002
_MTU = 1500


class StandinTrace:
    """A stand-in that is started: it waits a while before it reads, and is not stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Wait for a condition; False where the process has ended, or the time is over."""
        end = time.monotonic() + limit_s
        while not is_ready():
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if time.monotonic() > end or os.waitid(os.P_PID, self._pid, flags) is not None:
                return False
            time.sleep(_POLL_S)
        return True

    def let_go(self) -> None:
        """Do nothing: it runs."""


class StandinHost:
    """The host that a stand-in's directory plays."""

    kind = "standin"

    def __init__(self, directory: Path) -> None:
        """directory: BHYSEND_VMM_DIR.  Nothing is touched."""
        self._directory = directory.absolute()
        self.run_dir = self._directory / "run"

    def environment(self) -> Mapping[str, str]:
        """Return what hypervisors.open_host() needs to find this host again."""
        return {VMM_DIR: str(self._directory)}

    def sysctl(self, name: str) -> str | None:
        """Return a value of host.json, else a plausible one."""
        return sysctl(self._directory, name)

    def swap_used_bytes(self) -> int:
        """Return how much swap host.json says is in use."""
        return read_settings(self._directory).swap_used_bytes

    def free_memory_bytes(self) -> int:
        """Return what host.json says, else what this system has."""
        given = read_settings(self._directory).free_memory_bytes
        if given is not None:
            return given
        return _available_bytes()

    def program(self) -> list[str]:
        """Return the words that run the stand-in."""
        return inherited.program("standin")

    def trace(self, pid: int) -> StandinTrace:
        """Return what looks at a stand-in that is started."""
        return StandinTrace(pid)

    def program_hash(self) -> str:
        """Return what host.json says, else a hash of the stand-in's own modules."""
        given = read_settings(self._directory).program_hash
        if given is not None:
            return given
        modules = sorted(Path(__file__).parent.glob("*.py"))
        return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()

    def can_snapshot(self) -> bool | None:
        """Return what host.json says."""
        return read_settings(self._directory).can_snapshot

    def module_hash(self) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).module_hash

    def disk(self, path: str) -> Disk | None:
        """Return what a regular file is as a disk, changed by what host.json says of it."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
            return None
        disk = Disk(found.st_size, 512, False, os.access(path, os.W_OK))
        return replace(disk, **read_settings(self._directory).disks.get(path, {}))

    def mtu(self, interface: str) -> int | None:
        """Return what host.json says of a tap that exists, else 1500."""
        if not self.has_tap(interface):
            return None
        return read_settings(self._directory).mtus.get(interface, _MTU)

    def cpu_vendor(self) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).cpu_vendor

    def exists(self, name: str) -> bool:
        """Say whether the VM's node exists."""
        return node.node_path(self._directory, name).exists()

    def node_id(self, name: str) -> str:
        """Return the node's inode, "" where there is none.  Its times change with its memory."""
        try:
            found = os.stat(node.node_path(self._directory, name))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise from_oserror(error, f"look at VM {name}") from error
        return f"{found.st_dev}:{found.st_ino}"

    def open_vm(self, name: str, *, is_writable: bool = False) -> StandinVm:
        """Open a VM.  Raises GuestError where there is none."""
        return StandinVm(self._directory, name, is_writable=is_writable)

    def create(self, name: str) -> None:
        """Create an empty VM."""
        node.create(self._directory, name)

    def destroy(self, name: str) -> None:
        """Destroy a VM; one that is gone already is no error."""
        try:
            node.destroy(self._directory, name)
        except OSError as error:
            raise from_oserror(error, f"destroy VM {name}") from error

    def mount_null(self, directory: Path) -> None:
        """Bind /dev/null over directory/null; on Linux root may.  Raises GuestError."""
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
        """Undo mount_null()."""
        target = directory / "null"
        _run("umount", str(target))
        try:
            target.unlink(missing_ok=True)
        except OSError:  # still mounted, or not ours: it stays
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
        """Return the bridge that a tap belongs to."""
        try:
            return (self._directory / "net" / tap).read_text().strip() or None
        except OSError:
            return None

    def has_tap(self, tap: str) -> bool:
        """Say whether a tap exists."""
        return (self._directory / "net" / tap).exists()

    def make_tap(self, tap: str, bridge: str | None) -> None:
        """Create a tap.  Raises GuestError where there is one."""
        path = self._directory / "net" / tap
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(f"{bridge}\n" if bridge else "")
        except OSError as error:
            raise GuestError(f"cannot create {tap}: {error.strerror}") from error

    def parent_command(self, pid: int) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).parent_command

    def knows_suspending_lock(self) -> bool:
        """Return what host.json says; the stand-in's own supervisor knows it."""
        return read_settings(self._directory).knows_suspending_lock

    def datastores(self) -> Sequence[Path]:
        """Return the one datastore, if this host has vm-bhyve."""
        store = self._directory / "vm"
        return [store] if store.is_dir() else []


def _available_bytes() -> int:
    """Return the memory that can be had without swapping; where that is not told, all there is."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(*command: str) -> str:
    """Run a command; return "" or what it complained of, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return done.stderr.strip().partition("\n")[0].rstrip(".") or f"status {done.returncode}"
