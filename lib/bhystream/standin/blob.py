"""The state blobs of devices and kernel structures, as FILE.kern contains them.

A blob is JSON padded to a fixed size, so that one blob can be put in another's
place.  Each blob carries its own name and the guest's clock at the time of
saving, which are both checked after a restore, and its owner's fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Each blob is as large as bhyve's: vmcx has every vCPU's registers, fbuf its frame memory.
SIZES_BYTES = {"vmcx": 16 << 10, "vm": 4 << 10, "fbuf": 16 << 20}
DEFAULT_BYTES = 1 << 10


def pack_blob(name: str, kind: str, clock: int, fields: Mapping[str, Any]) -> bytes:
    """Return a blob: fields, name and clock as JSON, padded with NULs to the size of its kind."""
    text = json.dumps({"name": name, "clock": clock, **fields}).encode()
    return text.ljust(max(SIZES_BYTES.get(kind, DEFAULT_BYTES), len(text)), b"\0")


def unpack_blob(blob: bytes) -> dict[str, Any]:
    """Return the fields of a blob, {} if the blob holds no JSON object."""
    try:
        found = json.loads(blob.rstrip(b"\0"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def number(fields: Mapping[str, Any], key: str) -> int:
    """Return the count under a key of a blob, 0 if the key holds no count."""
    found = fields.get(key)
    return found if isinstance(found, int) and found >= 0 else 0
