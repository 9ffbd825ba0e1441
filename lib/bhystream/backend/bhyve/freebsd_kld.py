"""What FreeBSD's kernel linker knows about vmm: vmm's symbols, and the path of vmm.ko.

All of bhyve's snapshot code in the kernel is in vmm.ko.  A vmm.ko with that code
can be loaded into a kernel that was built without the code, so the kernel's own
configuration (kern.conftxt) and build (kern.build_id) say nothing about it.
Source: sys/modules/vmm/Makefile, sys/amd64/vmm/vmm.c, vm_snapshot_req(), FreeBSD 15.1.

Not run on FreeBSD.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

VMM = "vmm.ko"
SNAPSHOT_SYMBOL = "vm_snapshot_req"
# Every vmm.ko has this symbol.  If kldsym(2) does not find it, kldsym(2) finds no symbol
# of any module.
ANY_SYMBOL = "vm_get_topology"

_MAXPATHLEN = 1024  # Source: sys/sys/param.h, syslimits.h
_KLDSYM_LOOKUP = 1  # Source: sys/sys/linker.h


class SymLookup(ctypes.Structure):
    """struct kld_sym_lookup.  Source: sys/sys/linker.h."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("symname", ctypes.c_char_p),
        ("symvalue", ctypes.c_ulong),
        ("symsize", ctypes.c_size_t),
    )


class FileStat(ctypes.Structure):
    """struct kld_file_stat.  Source: sys/sys/linker.h."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("name", ctypes.c_char * _MAXPATHLEN),
        ("refs", ctypes.c_int),
        ("id", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("pathname", ctypes.c_char * _MAXPATHLEN),
    )


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def file_id(name: str, libc: Any = None) -> int:
    """Return the id of a loaded file, 0 if no file of that name is loaded.  Source: kldfind(2)."""
    found: int = (libc or _libc()).kldfind(name.encode())
    return max(found, 0)


def has_symbol(file: int, symbol: str, libc: Any = None) -> bool | None:
    """Say whether a loaded file has a symbol; None if the kernel does not answer.

    file: an id, 0 for any file.  A module's symbols are local.  kldsym(2) finds
    local symbols if debug.link_elf_obj_leak_locals is 1, the default.
    Source: kldsym(2); sys/kern/kern_linker.c, sys_kldsym(); link_elf_obj.c.
    """
    lookup = SymLookup(version=ctypes.sizeof(SymLookup), symname=symbol.encode())
    ctypes.set_errno(0)
    if (libc or _libc()).kldsym(file, _KLDSYM_LOOKUP, ctypes.byref(lookup)) == 0:
        return True
    return False if ctypes.get_errno() == errno.ENOENT else None


def path(file: int, libc: Any = None) -> str:
    """Return the path that a file was loaded from, "" if the kernel does not tell it.

    Source: kldstat(2); sys/kern/kern_linker.c, kern_kldstat().
    """
    found = FileStat(version=ctypes.sizeof(FileStat))
    if (libc or _libc()).kldstat(file, ctypes.byref(found)) != 0:
        return ""
    return os.fsdecode(found.pathname)


def can_snapshot(libc: Any = None) -> bool | None:
    """See host.Host.can_snapshot().  Works also if vmm is part of the kernel.

    libc: for tests; the C library if None.
    """
    file = file_id(VMM, libc)
    found = has_symbol(file, SNAPSHOT_SYMBOL, libc)
    if found is False and not has_symbol(file, ANY_SYMBOL, libc):
        return None
    return found
