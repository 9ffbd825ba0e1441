"""Where bhyve puts a guest's memory: lowmem from 0 to 3 GiB, highmem from 4 GiB on."""

from __future__ import annotations

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, LOWMEM_LIMIT_BYTES, Host
from bhystream.errors import Reason
from bhystream.guest import PAGE_BYTES, Layout, Segment

# Source: sys/kern/sys_generic.c, devfs_iosize_max().
_CLAMP = "debug.devfs_iosize_max_clamp"
_CLAMP_BYTES = (1 << 31) - 1


def memory_spans(memory_bytes: int) -> list[tuple[int, int, int]]:
    """Return (gpa, offset in FILE, length) of lowmem and, above 3 GiB, of highmem.

    All in bytes.  Source: FreeBSD lib/libvmmapi/vmmapi.c, vm_setup_memory().
    """
    low = min(memory_bytes, LOWMEM_LIMIT_BYTES)
    spans = [(0, 0, low)]
    if memory_bytes > low:
        spans.append((HIGHMEM_BASE_GPA, low, memory_bytes - low))
    return spans


def layout_of(memory_bytes: int) -> Layout:
    """Return the segments of a guest with this much memory."""
    names = ("lowmem", "highmem")
    spans = memory_spans(memory_bytes)
    return Layout(
        tuple(
            Segment(name, gpa, length // PAGE_BYTES)
            for name, (gpa, _, length) in zip(names, spans, strict=False)
        )
    )


def clamped(host: Host, memory_bytes: int) -> Reason | None:
    """Return why bhyve cannot write a guest's memory to a device, or None.

    bhyve writes lowmem, and then highmem, with one write(2) each, unless its
    standard input is a terminal.  If a write has more than INT_MAX bytes, devfs
    returns EINVAL, and the checkpoint fails.  Run on FreeBSD 15.1.
    Source: usr.sbin/bhyve/snapshot.c, vm_snapshot_mem_part();
    sys/fs/devfs/devfs_vnops.c, devfs_write_f().
    """
    longest = max(length for _, _, length in memory_spans(memory_bytes))
    value = (host.sysctl(_CLAMP) or "0").strip()
    if longest <= _CLAMP_BYTES or value == "0":
        return None
    return Reason(
        f"{_CLAMP}: it is {value} here, so no device takes the {longest} bytes that bhyve writes"
        " at once",
        f"sysctl {_CLAMP}=0 lets the null device take them, and {_CLAMP}=0 in /etc/sysctl.conf"
        " keeps it so",
    )
