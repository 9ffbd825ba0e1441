"""Which pages were ever touched: when mincore(2) may be asked, and its answer as extents.

A page that was never touched is zero, and reading it through our mapping would
allocate it: the source host would pay for the whole guest.  mincore(2) can
tell, but lies in three ways:

- with vm.mincore_mapped at 1, its default, it looks at the pages that *we*
  have mapped, so that all are missing at first.  At 0 it looks at the memory
  object.
- a page in swap is as little resident as one never touched.  Taken for zero it
  would be lost.  A guest that is wired, and whose VM is still there, is not
  swapped, and where no swap is in use nothing of it is there.

- a call loses answers when the process's address space changes meanwhile,
  which libc.resident() sees and asks again.

So it is believed only if the first two are excluded; otherwise every page is
read, which is always right.  We never set the sysctl: it is the whole host's.

Source: sys/vm/vm_mmap.c, kern_mincore(): at 0, a page that is not in our page
tables is looked up in the mapping's own object, if that is of swap (OBJ_SWAP),
as vmm's is (sys/dev/vmm/vmm_mem.c, vm_alloc_memseg()); run on FreeBSD 15.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from bhystream.backend.bhyve.host import Host

_MINCORE_MAPPED = "vm.mincore_mapped"
_ALL_READ = "so every page of the guest is read, and so allocated"
_MARKS = b"\0" + b"\1" * 255


def believes_mincore(host: Host, is_wired: bool) -> tuple[bool, str]:
    """Say whether pages that mincore(2) does not call resident are zero, and if not, why.

    is_wired: every map of the guest's system memory is.  The reason is one
    line that begins with its key, or "".

    Swap may come into use at any time: ask once more after the answer of
    mincore(2) is there, and believe that answer only if both say True.
    """
    mapped = host.sysctl(_MINCORE_MAPPED)
    if mapped is None:
        return False, f"{_MINCORE_MAPPED}: this host has no such sysctl, {_ALL_READ}"
    if mapped.strip() != "0":
        return False, (
            f"{_MINCORE_MAPPED}: it is {mapped.strip()} here, not 0, {_ALL_READ};"
            f" sysctl {_MINCORE_MAPPED}=0 spares the pages never touched"
        )
    if is_wired:
        return True, ""
    used_bytes = host.swap_used_bytes()
    if used_bytes:
        return False, (
            f"swap: {used_bytes} bytes are in use here, not 0, and the guest is not wired,"
            f" {_ALL_READ}; memory.wired=true or unused swap spares the pages never touched"
        )
    return True, ""


def extents(marks: bytes, base_page: int) -> Iterator[tuple[int, int]]:
    """Yield the extents [first, end) of pages whose byte is other than 0.

    marks: one byte a page.  base_page: the page that marks[0] stands for.
    Ascending, disjoint, none touches the next.

    The walk is two memchr(3) an extent, after one pass that makes every mark
    the same: a vector of 2 MiB, which is a guest of 8 GiB, takes 2 ms if it is
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
    """Yield the extents of a dirty log: one vector for each segment, as Vm.dirty() returns.

    base_pages: the first page of each.  No extent crosses from one to the
    next.  Raises ValueError, before the walk, if the two are not equally many.
    """
    pairs = list(zip(log, base_pages, strict=True))
    return chain.from_iterable(extents(marks, base_page) for marks, base_page in pairs)
