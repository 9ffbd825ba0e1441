"""What an image file leads QEMU to: the format in its header, its size, and other files.

The guest of a raw disk can write any header into it, so a header is hostile if
the guest, or whoever sent it, is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from bhystream.backend.qemu.graph import local_path
from bhystream.beneath import fault_below, is_trusted, is_written_by_others

HEADER_BYTES = 80
_QCOW2_MAGIC = b"QFI\xfb"
# The place of the size in the header, big-endian.  Source: qemu/qemu docs/interop/qcow2.txt.
_QCOW2_SIZE = slice(24, 32)
_QCOW2_FEATURES = slice(72, 80)
_QCOW2_DATA_FILE = 1 << 2  # an incompatible feature: the data lies in an external file
_MAX_BACKING_BYTES = 1023


def is_qcow2(header: bytes) -> bool:
    """Say whether a file with this header is a qcow2 image."""
    return header.startswith(_QCOW2_MAGIC)


def size_bytes(header: bytes) -> int:
    """Return the size that a guest sees of a qcow2 image."""
    return int.from_bytes(header[_QCOW2_SIZE], "big")


def place_fault(path: str, below: Sequence[str]) -> str:
    """Return why a disk does not lie below one of the directories; "" if it does."""
    if not path.startswith("/"):
        return "--below allows no disk that QEMU opens by a protocol"
    return fault_below(path, below)


def leads_on(path: str, header: bytes) -> str:
    """Return why a qcow2 image could lead QEMU to another file than itself; "" if it could not.

    header: the image's first bytes.  The guest of a raw disk can write such a header.
    """
    version, backing = struct.unpack_from(">IQ", header.ljust(HEADER_BYTES, b"\0"), 4)
    incompatible = int.from_bytes(header[_QCOW2_FEATURES], "big") if version > 2 else 0
    if backing or incompatible & _QCOW2_DATA_FILE:
        return "--below allows no image that names another file"
    found = os.stat(path)
    if is_written_by_others(found) or not is_trusted(found):
        return "--below allows no qcow2 image that another user may write to"
    return ""


def backing_file(path: str, header: bytes) -> str:
    """Return the path of a qcow2 image's backing file; "" if it has none, or none with a path.

    header: the image's first bytes.
    """
    offset_bytes, length_bytes = struct.unpack_from(">QI", header.ljust(20, b"\0"), 8)
    if not offset_bytes or length_bytes > _MAX_BACKING_BYTES:
        return ""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset_bytes)
        name = os.fsdecode(file.read(length_bytes))
    return local_path(name, os.path.dirname(path)) or ""
