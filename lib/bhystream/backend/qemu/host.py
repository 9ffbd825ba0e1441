"""The host's part of the HOST section; the hw.* keys are named after FreeBSD's sysctls."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil

from bhystream.errors import GuestError


def host_id() -> str:
    """Return 32 hex digits that identify this host and tell nothing else about it.

    machine-id(5) asks that the machine id be hashed before it leaves the machine.
    """
    raw = ""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as file:
                raw = file.read().strip()
        except OSError:
            continue
        if raw:
            break
    return hashlib.sha256(f"bhystream {raw or os.uname().nodename}".encode()).hexdigest()[:32]


def cpu_model() -> str:
    """Return the first processor's model name, or the architecture if Linux names no model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return os.uname().machine


def describe(hypervisor_version: str) -> dict[str, str | int]:
    """Return the HOST section of a QEMU host."""
    name = os.uname()
    return {
        "hypervisor": "qemu",
        "hypervisor_version": hypervisor_version,
        "arch": name.machine,
        "os": name.sysname,
        "kernel": name.release,
        "hw.machine": name.machine,
        "hw.model": cpu_model(),
        "hw.pagesize": mmap.PAGESIZE,
        "host_id": host_id(),
    }


def memory_available_bytes() -> int | None:
    """Return MemAvailable of proc_meminfo(5), or None."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def program(arch: str) -> str:
    """Return the path of the QEMU to run: BHYRECV_QEMU, else qemu-system-ARCH on PATH.

    Raises GuestError if there is no such program.
    """
    wanted = os.environ.get("BHYRECV_QEMU") or f"qemu-system-{arch}"
    found = shutil.which(wanted)
    if found is None:
        raise GuestError(f"cannot find {wanted}", hint="install it, or set BHYRECV_QEMU")
    return found
