"""Calls that Python's library lacks: mincore(2), sysctl(3), and mmap(2) with MAP_FIXED.

All except sysctl are the same on Linux, where their tests run; mincore and
sysctl were run on FreeBSD 15.1.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from bhystream.errors import GuestError
from bhystream.guest import PAGE_BYTES

_MAP_FIXED = 0x10  # Source: sys/sys/mman.h; the same on Linux
INCORE = 0x1  # MINCORE_INCORE.  Source: sys/sys/mman.h; Linux has only this bit.

_MINCORE_TRIES = 8
_ONLY_INCORE = bytes(value & INCORE for value in range(256))

# Source: sys/sys/sysctl.h, CTLTYPE_*.  The formats are struct's, by size and sign.
_CTLTYPE_MASK = 0xF
_CTLTYPE_STRING = 3
_INTEGERS = {
    0x2: "<i",  # INT
    0x4: "<q",  # S64
    0x6: "<I",  # UINT
    0x7: "<q",  # LONG
    0x8: "<Q",  # ULONG
    0x9: "<Q",  # U64
    0xA: "<B",  # U8
    0xB: "<H",  # U16
    0xC: "<b",  # S8
    0xD: "<h",  # S16
    0xE: "<i",  # S32
    0xF: "<I",  # U32
}
# Source: sys/sys/sysctl.h, CTL_SYSCTL and CTL_SYSCTL_OIDFMT; sysctl(8) asks the same way.
_CTL_SYSCTL = 0
_CTL_SYSCTL_OIDFMT = 4
_CTL_MAXNAME = 24


class _Buffer(ctypes.Structure):
    """Python's Py_buffer.  Source: Python's C API, "Buffer structure"."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _call(function: Any, *arguments: Any) -> int:
    """Call a C function; return 0 if it succeeded, else errno."""
    ctypes.set_errno(0)
    return 0 if function(*arguments) == 0 else ctypes.get_errno()


def mincore(address: int, length_bytes: int, marks: Any) -> int:
    """Call mincore(2); return 0 if it succeeded, else errno.

    marks: a ctypes array with one byte per page.
    """
    call = ctypes.CDLL(None, use_errno=True).mincore
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    call.restype = ctypes.c_int
    return _call(call, address, length_bytes, marks)


def resident(
    mapping: mmap.mmap, ask: Callable[[int, int, ctypes.Array[ctypes.c_char]], int] = mincore
) -> bytes:
    """Return one byte per page of a mapping: 1 if mincore(2) says "resident", else 0.

    ask: mincore(), or a stand-in with the same arguments.  Only the bit INCORE
    counts.  Raises GuestError if mincore(2) fails.

    FreeBSD's mincore(2) loses answers.  If another thread of the process
    changes the address space during the call, as malloc(3) and free(3) may,
    the kernel goes on at the page that it had reached, but writes 0 for every
    page before that page, also for pages that contain data.  The mapping's
    first page is always among the lost ones.  So the first page is read before
    each call, which makes it resident, and an answer that calls the first page
    not resident is asked again.  After the last try all pages count as
    resident, which is always safe.
    On FreeBSD 15.1, 37 of 40 calls for 65,536 pages lost answers while another
    thread mapped and unmapped one MiB every millisecond.
    Source: sys/vm/vm_mmap.c, kern_mincore(): after RestartScan, lastvecindex
    is set back but addr is not; if the scan was at its end, there may be no
    map entry to look up, and the call fails with ENOMEM.
    """
    npages = -(-len(mapping) // PAGE_BYTES)
    marks = ctypes.create_string_buffer(npages)
    # ctypes.from_buffer() does not take a read-only mapping, so the address comes from
    # PyObject_GetBuffer().  The mapping cannot be closed until the buffer is released.
    held = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(held), 0)
    try:
        for _ in range(_MINCORE_TRIES):
            _ = mapping[0]
            number = ask(held.buf, len(mapping), marks)
            if number not in (0, errno.ENOMEM):
                raise GuestError(f"cannot ask which pages are resident: {os.strerror(number)}")
            answer = marks.raw.translate(_ONLY_INCORE)
            if number == 0 and answer[0]:
                return answer
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))
    return b"\1" * npages


def map_pieces(fd: int, pieces: Sequence[tuple[int, int]], *, is_writable: bool) -> mmap.mmap:
    """Map pieces of a file one after another in memory, shared; the caller owns the mapping.

    pieces: (offset, length) of each, in bytes, multiples of a page.  Pieces are
    needed because mmap(2) of a VM's node takes no range that crosses two entries
    of the VM's memory map, and a guest with memory domains (bhyve -n) has
    several entries.  Raises OSError.
    Source: mmap(2); sys/dev/vmm/vmm_dev.c, vmmdev_mmap_single().
    """
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    whole = mmap.mmap(-1, sum(length for _, length in pieces), mmap.MAP_PRIVATE, prot)
    held = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(whole), ctypes.byref(held), 0)
    try:
        at = held.buf
        for offset, length in pieces:
            _map_over(at, length, prot, fd, offset)
            at += length
    except OSError:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))
        whole.close()
        raise
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))
    return whole


def _map_over(address: int, length: int, prot: int, fd: int, offset: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    call.restype = ctypes.c_void_p
    if call(address, length, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def show(kind: int, raw: bytes) -> str | None:
    """Return a sysctl's value as `sysctl -n` prints it.

    kind: the kernel's CTLTYPE_* and flags.  Returns None for a node, for a
    structure, and for a value whose size does not fit its kind.
    """
    ctltype = kind & _CTLTYPE_MASK
    if ctltype == _CTLTYPE_STRING:
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
    layout = _INTEGERS.get(ctltype)
    if layout is None or len(raw) != struct.calcsize(layout):
        return None
    return str(struct.unpack(layout, raw)[0])


def _read(libc: Any, mib: list[int]) -> bytes | None:
    """Return the raw value at a MIB, or None if sysctl(3) fails."""
    name = (ctypes.c_int * len(mib))(*mib)
    for _ in range(4):  # the value may grow between the two calls
        length = ctypes.c_size_t(0)
        if _call(libc.sysctl, name, len(mib), None, ctypes.byref(length), None, 0):
            return None
        value = ctypes.create_string_buffer(max(length.value, 1))
        number = _call(libc.sysctl, name, len(mib), value, ctypes.byref(length), None, 0)
        if number == 0:
            return value.raw[: length.value]
        if number != errno.ENOMEM:
            return None
    return None


def sysctl(name: str) -> str | None:
    """Return a value as `sysctl -n` prints it, or None if no value has that name.

    Source: sysctl(3), sysctlnametomib(); sbin/sysctl/sysctl.c, oidfmt(), for
    how to ask for the type.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mib = (ctypes.c_int * _CTL_MAXNAME)()
    length = ctypes.c_size_t(_CTL_MAXNAME)
    libc.sysctl.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    if _call(libc.sysctlnametomib, name.encode("ascii"), mib, ctypes.byref(length)):
        return None
    found = list(mib)[: length.value]
    kind = _read(libc, [_CTL_SYSCTL, _CTL_SYSCTL_OIDFMT, *found])
    if kind is None or len(kind) < 4:
        return None
    raw = _read(libc, found)
    return None if raw is None else show(struct.unpack_from("<I", kind)[0], raw)
