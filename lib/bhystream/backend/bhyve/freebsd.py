"""The FreeBSD host: host.Host over sysctls, the base system's programs and /dev/vmm.

Run on FreeBSD 15.1, except for what is marked "not run" here, in freebsd_disk.py
and in freebsd_kld.py.  Every fact names its source.

Programs are run by absolute path, with an argument vector and without a shell.
No name that begins with "-" or leads out of a directory reaches a program.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from bhystream.backend import process_freebsd, programs
from bhystream.backend.bhyve import (
    freebsd_announce,
    freebsd_disk,
    freebsd_kld,
    freebsd_text,
    libc,
    vmconf,
)
from bhystream.backend.bhyve.freebsd_trace import Trace
from bhystream.backend.bhyve.freebsd_vm import FreeBsdVm
from bhystream.backend.bhyve.host import ClockLayout, Disk, NoBhyveError
from bhystream.backend.process import Identity
from bhystream.errors import AccessError, GuestError, from_oserror

BHYVE = "/usr/sbin/bhyve"  # Source: bhyve(8)
_BHYVECTL = "/usr/sbin/bhyvectl"  # Source: bhyvectl(8)
_IFCONFIG = "/sbin/ifconfig"  # Source: ifconfig(8)
_MOUNT = "/sbin/mount"  # Source: mount(8)
_UMOUNT = "/sbin/umount"  # Source: umount(8)
_SWAPINFO = "/usr/sbin/swapinfo"  # Source: swapinfo(8)
# What vm-bhyve's lib/vm-base does first; it reads also /etc/rc.conf.d/vm, which sysrc(8) does not.
_RC = ". /etc/rc.subr; load_rc_config vm"
_VM = Path("/usr/local/sbin/vm")
_VM_RUN = Path("/usr/local/lib/vm-bhyve/vm-run")  # Source: freebsd-ports sysutils/vm-bhyve
_NODES = "/dev/vmm"  # Source: sys/amd64/vmm/vmm_dev.c: make_dev("vmm/%s")
_RUN_DIR = "/var/run/bhyve"  # Source: usr.sbin/bhyve/ipc.h, BHYVE_RUN_DIR

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,14}")  # IFNAMSIZ is 16.  Source: net/if.h
_NG_DEVICE = re.compile(r"ngd[0-9]+")  # Source: ng_device(4); net_backends.c, tap_init()
_CHUNK_BYTES = 1 << 20


def _checked(name: str, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.fullmatch(name):
        raise GuestError(f"{name!r} is no name of {what}")
    return name


def _hash(path: str) -> str:
    """Return the XXH3-128 of a file, hex."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
    except OSError as error:
        raise from_oserror(error, f"read {path}") from None
    return digest.hexdigest()


# By kern.osreldate.  Source: sys/amd64/vmm/vmm.c, vm_snapshot_vcpus(); sys/amd64/include/vmm.h,
# struct vm_exit.
CLOCKS = {
    "1501000": ClockLayout(vcpu_bytes=184, tsc_at=176, vm_tail_bytes=128, hpet_tail_bytes=0),
}


class FreeBsdHost:
    """host.Host on FreeBSD.  The object keeps nothing open."""

    kind = "bhyve"

    def __init__(self) -> None:
        """Raise NoBhyveError on any other system."""
        if os.uname().sysname != "FreeBSD":
            raise NoBhyveError("there is no bhyve here: this is no FreeBSD host")
        self.run_dir = Path(_RUN_DIR)

    def environment(self) -> Mapping[str, str]:
        """See host.Host.  Empty: no variable is needed to find this host again."""
        return {}

    def sysctl(self, name: str) -> str | None:
        """See host.Host."""
        return libc.sysctl(name)

    def swap_used_bytes(self) -> int:
        """See host.Host."""
        return freebsd_text.swap_used_bytes(programs.ask(_SWAPINFO, "-k"))

    def free_memory_bytes(self) -> int:
        """See host.Host.  Counts free and inactive pages, and what ZFS's cache can give back.

        Source: sys/vm/vm_meter.c, vm.stats.vm; for kstat.zfs.misc.arcstats,
        which exists if ZFS is loaded, prometheus/node_exporter
        collector/zfs_freebsd.go, NewZFSCollector().
        """
        npages = self._count("vm.stats.vm.v_free_count", "vm.stats.vm.v_inactive_count")
        cache_bytes = self._count("kstat.zfs.misc.arcstats.size")
        least_bytes = self._count("kstat.zfs.misc.arcstats.c_min")
        page_bytes = int(self.sysctl("hw.pagesize") or 4096)
        return npages * page_bytes + max(0, cache_bytes - least_bytes)

    def _count(self, *names: str) -> int:
        """Return the sum of sysctls.  A sysctl that does not exist counts 0."""
        return sum(int(self.sysctl(name) or 0) for name in names)

    def program(self) -> list[str]:
        """See host.Host."""
        return [BHYVE]

    def trace(self, pid: int) -> Trace:
        """See host.Host."""
        return Trace(pid)

    def has_power_button(self, pid: int) -> bool:
        """See host.Host.  bhyve waits for SIGTERM by kevent(2), and ignores it beside that."""
        return process_freebsd.ignores(pid, signal.SIGTERM)

    def program_hash(self) -> str:
        """See host.Host.  Returns the XXH3-128 of the program's file, hex."""
        return _hash(BHYVE)

    def can_snapshot(self) -> bool | None:
        """See host.Host.  Not run."""
        return freebsd_kld.can_snapshot()

    def module_hash(self) -> str:
        """See host.Host.  Returns the XXH3-128, hex, of the file that vmm.ko was loaded from.

        If the file was replaced after it was loaded, nothing shows that.  Not run.
        """
        file = freebsd_kld.file_id(freebsd_kld.VMM)
        path = freebsd_kld.path(file) if file else ""
        return _hash(path) if path else ""

    def clock_layout(self) -> ClockLayout | None:
        """See host.Host.  Known are only kernels on which guests were moved with it."""
        return CLOCKS.get(self.sysctl("kern.osreldate") or "")

    def disk(self, path: str) -> Disk | None:
        """See host.Host.  Not run."""
        return freebsd_disk.disk(path)

    def mtu(self, interface: str) -> int | None:
        """See host.Host.  Not run."""
        return freebsd_disk.mtu(_checked(interface, _INTERFACE, "an interface"))

    def cpu_vendor(self) -> str:
        """See host.Host."""
        return freebsd_text.vendor(
            self.sysctl("hw.model") or "", self.sysctl("hw.vmm.vmx.initialized")
        )

    # VMs.

    def _node(self, name: str) -> str:
        return f"{_NODES}/{_checked(name, _NAME, 'a guest')}"

    def exists(self, name: str) -> bool:
        """See host.Host."""
        return bool(self.node_id(name))

    def node_id(self, name: str) -> str:
        """See host.Host.  Returns the node's device, inode number, and time of the last change.

        The inode number alone may be used again for a later node.  The last
        change is the node's creation: opening and reading the node change
        neither number nor time.  Unverified.
        Source: sys/fs/devfs/devfs_vnops.c, devfs_getattr().
        """
        try:
            found = os.stat(self._node(name))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise from_oserror(error, f"look at {self._node(name)}") from None
        return f"{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}"

    def node_status(self, name: str) -> os.stat_result:
        """See host.Host.  Source: sys/dev/vmm/vmm_dev.c, vmmdev_create(): root's, 0600."""
        try:
            return os.stat(self._node(name))
        except OSError as error:
            raise from_oserror(error, f"look at VM {name}") from None

    def open_vm(self, name: str, *, is_writable: bool = False) -> FreeBsdVm:
        """See host.Host."""
        return FreeBsdVm(name, self._node(name), is_writable=is_writable)

    def create(self, name: str) -> None:
        """See host.Host.  Source: bhyvectl(8)."""
        node = self._node(name)
        if os.path.exists(node):
            raise GuestError(f"guest {name}: {node} exists already")
        programs.do(f"create guest {name}", _BHYVECTL, "--create", f"--vm={name}")

    def destroy(self, name: str) -> None:
        """See host.Host.  Source: bhyvectl(8)."""
        if not self.exists(name):
            return
        try:
            programs.do(f"destroy guest {name}", _BHYVECTL, "--destroy", f"--vm={name}")
        except GuestError:
            if self.exists(name):  # if it is gone, another process has destroyed it
                raise

    # Directories.

    def mount_null(self, directory: Path) -> None:
        """See host.Host.  Mounts a devfs on the directory, with all the host's devices.

        bhyve opens the memory file in capability mode.  There, a relative name
        below a directory may cross a mount point, but a symbolic link may not
        lead out of the directory.  A devfs mounted outside a jail has no
        ruleset, so null is in it.
        Confirmed in source, never run: sys/kern/vfs_lookup.c, NI_LCF_STRICTREL;
        sys/fs/devfs/devfs_vfsops.c, devfs_mount().
        """
        programs.do(f"mount devfs on {directory}", _MOUNT, "-t", "devfs", "devfs", str(directory))
        try:
            mode = os.stat(directory / "null", follow_symlinks=False).st_mode
        except OSError as error:
            self.unmount_null(directory)
            raise GuestError(f"cannot use {directory}/null: {error.strerror}") from None
        if not stat.S_ISCHR(mode):
            self.unmount_null(directory)
            raise GuestError(f"cannot use {directory}/null: it is no device")

    def unmount_null(self, directory: Path) -> None:
        """See host.Host.  A busy mount is unmounted by force: it has no data of ours."""
        with contextlib.suppress(GuestError):
            if programs.run(_UMOUNT, str(directory)).returncode != 0:
                programs.run(_UMOUNT, "-f", str(directory))

    def _mounts(self) -> list[freebsd_text.Mount]:
        return freebsd_text.mounts(programs.ask(_MOUNT, "-p"))

    def is_memory(self, directory: Path) -> bool:
        """See host.Host.  True if the file system of the directory is a tmpfs."""
        try:
            device = os.stat(directory).st_dev
        except OSError as error:
            raise from_oserror(error, f"look at {directory}") from None
        for mount in self._mounts():
            if mount.fstype == "tmpfs":
                with contextlib.suppress(OSError):
                    if os.stat(mount.directory).st_dev == device:
                        return True
        return False

    def parent_command(self, pid: int) -> str:
        """See host.Host."""
        return process_freebsd.parent_command(pid)

    def knows_suspending_lock(self) -> bool:
        """See host.Host.  Source: freebsd/vm-bhyve@0c93a8fb lib/vm-run; the port's PREFIX/lib."""
        try:
            return "suspending.lock" in _VM_RUN.read_text("utf-8", "replace")
        except OSError:
            return False

    def datastores(self) -> Sequence[Path]:
        """See host.Host.  Source: vm-bhyve lib/vm-datastore."""
        spec = programs.ask("/bin/sh", "-c", f'{_RC}; echo "$vm_dir"').strip()
        table = self._mounts() if spec else []
        default = freebsd_text.store_path(spec, table)
        if default is None:
            return ()
        try:
            text = Path(default, ".config", "system.conf").read_text("utf-8", "replace")
        except FileNotFoundError:
            text = ""
        except PermissionError as error:
            raise AccessError(f"cannot read {error.filename}: {error.strerror}") from None
        except OSError as error:
            raise from_oserror(error, f"read {error.filename}") from None
        config = vmconf.parse(text)
        return [Path(default), *map(Path, freebsd_text.more_stores(config, table))]

    def starter(self) -> Sequence[str]:
        """See host.Host.  Source: vm-bhyve lib/vm-core, core::__start(): tmux has its own PATH."""
        stores = self.datastores()
        if not stores or not _VM.exists():
            return ()
        try:
            text = (stores[0] / ".config" / "system.conf").read_text("utf-8", "replace")
        except OSError:
            text = ""
        return () if vmconf.parse(text).get("console") == "tmux" else (str(_VM), "start")

    def manager_finds(self, program: Path) -> bool:
        """See host.Host.  Does what vm-bhyve's lib/vm-base does with PATH, and asks sh(1)."""
        path = f"{program.parent}:/bin:/usr/bin:/usr/local/bin:/sbin:/usr/sbin:/usr/local/sbin"
        asks = f"PATH={path}; {_RC}; command -v {program.name}"
        return programs.ask("/bin/sh", "-c", asks).strip() == str(program)

    # The network.  Source: ifconfig(8), tap(4).

    def has_tap(self, tap: str) -> bool:
        """See host.Host."""
        if _NG_DEVICE.fullmatch(tap):
            return os.path.exists(f"/dev/{tap}")
        return programs.run(_IFCONFIG, _checked(tap, _INTERFACE, "an interface")).returncode == 0

    def announce(self, cards: Mapping[str, str], process: Identity) -> None:
        """See host.Host."""
        for interface in cards:
            _checked(interface, _INTERFACE, "an interface")
        freebsd_announce.announce(cards, process)
