"""The pages that a guest ever touched: when mincore(2) tells them, and its answer as extents.

A page that was never touched is zero, but reading it through our mapping would
allocate it, and the source host would need memory for the whole guest.
mincore(2) tells which pages were touched, but it is wrong in three cases:

- If vm.mincore_mapped is 1, its default, mincore(2) looks at the pages that our
  process has mapped in, and at first that is none of them.  If it is 0,
  mincore(2) looks at the memory object.
- A page in swap is not resident, like a page that was never touched; if it were
  taken for zero, it would be lost.  No page of a guest is in swap if the guest is
  wired and its VM still exists, or if no swap is in use at all.
- A call loses answers if the process's address space changes during the call;
  libc.resident() notices that and asks again.

So mincore(2) is believed only if the first two cases are excluded; otherwise
every page is read, which is always right.  The programs never set the sysctl,
because it applies to the whole host.

Source: sys/vm/vm_mmap.c, kern_mincore(): if the sysctl is 0 and a page is not in
our page tables, the kernel looks for the page in the mapping's own object, if that
object is a swap object (OBJ_SWAP).  vmm makes swap objects (sys/dev/vmm/vmm_mem.c,
vm_alloc_memseg()); run on FreeBSD 15.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from bhystream.backend.bhyve.host import Host
from bhystream.errors import Reason

_MINCORE_MAPPED = "vm.mincore_mapped"
_ALL_READ = "so every page of the guest is read, and so allocated"
_MARKS = b"\0" + b"\1" * 255


def believes_mincore(host: Host, is_wired: bool) -> tuple[bool, Reason]:
    """Say whether pages that mincore(2) does not call resident are zero, and if not, why.

    is_wired: whether every map of the guest's system memory is wired.  The reason is empty
    if they are.

    Swap may come into use at any time, so call this function before and after
    mincore(2), and believe mincore(2) only if both calls return True.
    """
    mapped = host.sysctl(_MINCORE_MAPPED)
    if mapped is None:
        return False, Reason(f"{_MINCORE_MAPPED}: this host has no such sysctl, {_ALL_READ}")
    if mapped.strip() != "0":
        return False, Reason(
            f"{_MINCORE_MAPPED}: it is {mapped.strip()} here, not 0, {_ALL_READ}",
            f"sysctl {_MINCORE_MAPPED}=0 spares the pages never touched, and"
            f" {_MINCORE_MAPPED}=0 in /etc/sysctl.conf keeps it so",
        )
    if is_wired:
        return True, Reason("")
    used_bytes = host.swap_used_bytes()
    if used_bytes:
        return False, Reason(
            f"swap: {used_bytes} bytes are in use here, not 0, and the guest is not wired,"
            f" {_ALL_READ}",
            "to spare the pages never touched, use no swap (swapoff -a), or start it with"
            " memory.wired=true",
            "memory.wired",
        )
    return True, Reason("")


def extents(marks: bytes, base_page: int) -> Iterator[tuple[int, int]]:
    """Yield the extents [first, end) of pages whose byte is other than 0.

    marks: one byte per page.  base_page: the page that marks[0] stands for.
    The extents ascend, are disjoint, and do not touch each other.

    The walk takes two memchr(3) per extent, after one pass that makes every mark
    the same: a vector of 2 MiB, for a guest of 8 GiB, takes 2 ms if it is
    mostly empty or mostly full, and 0.2 s if every other page is marked.
    """
    marks = marks.translate(_MARKS)
    first = marks.find(1)
    while first >= 0:
        end = marks.find(0, first)
        if end < 0:
            end = len(marks)
        yield base_page + first, base_page + end
        first = marks.find(1, end)


def dirty_extents(log: Sequence[bytes], base_pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the extents of a dirty log.

    log: one vector for each segment, as Vm.dirty() returns them.  base_pages:
    the first page of each segment.  No extent crosses into the next segment.
    Raises ValueError, before the walk, if log and base_pages differ in length.
    """
    pairs = list(zip(log, base_pages, strict=True))
    return chain.from_iterable(extents(marks, base_page) for marks, base_page in pairs)
