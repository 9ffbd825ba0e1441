"""The state blobs of devices and kernel structures, as they stand in FILE.kern.

A blob is JSON in a fixed size, so that one can be put in another's place: it
carries its own name and the guest's clock when it was saved, both checked
after a restore, and what else its owner keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# As large as what it plays: vmcx holds every vCPU's registers, fbuf its frame memory.
SIZES_BYTES = {"vmcx": 16 << 10, "vm": 4 << 10, "fbuf": 16 << 20}
_DEFAULT_BYTES = 1 << 10


def pack_blob(name: str, kind: str, clock: int, fields: Mapping[str, Any]) -> bytes:
    """Return a blob; kind decides its size."""
    text = json.dumps({"name": name, "clock": clock, **fields}).encode()
    return text.ljust(max(SIZES_BYTES.get(kind, _DEFAULT_BYTES), len(text)), b"\0")


def unpack_blob(blob: bytes) -> dict[str, Any]:
    """Return what a blob says; {} for one that says nothing."""
    try:
        found = json.loads(blob.rstrip(b"\0"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def number(fields: Mapping[str, Any], key: str) -> int:
    """Return a count of a blob, 0 where it has none."""
    found = fields.get(key)
    return found if isinstance(found, int) and found >= 0 else 0
