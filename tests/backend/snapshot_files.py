"""The .meta and .kern files that a bhyve of FreeBSD 14 writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MEMORY = 16 << 20
KERNEL = ("vhpet", "vm", "vioapic", "vlapic", "vmcx", "vatpit", "vatpic", "vpmtmr", "vrtc")
DEVICES = ("hostbridge@pci.0.0.0", "virtio-blk@pci.0.3.0", "virtio-blk@pci.0.4.0", "atkbdc")
HOST = {"hypervisor": "bhyve", "os": "FreeBSD"}
CONFIG = {
    "name": "web1",
    "keys": {
        "cpus": "2", "sockets": "2", "cores": "1", "threads": "1",
        "memory.size": str(MEMORY), "uuid": "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e",
        "pci.0.0.0.device": "hostbridge",
        "pci.0.3.0.device": "virtio-blk", "pci.0.3.0.ser": "ONE",
        "pci.0.4.0.device": "virtio-blk", "pci.0.4.0.ser": "TWO",
    },
    "resources": {"disk0": "pci.0.3.0.path", "disk1": "pci.0.4.0.path"},
}  # fmt: skip
Json = dict[str, Any]


def made(memory_bytes: int = MEMORY) -> tuple[Json, bytes]:
    """Return the JSON of a .meta of FreeBSD 14, and the bytes of its .kern."""
    at = 0
    blobs = []
    lists: dict[str, list[Json]] = {"kern_structs": [], "devices": []}
    for key, names in (("kern_structs", KERNEL), ("devices", DEVICES)):
        for number, name in enumerate(names):
            data = os.urandom(100 + 37 * number)
            lists[key].append({"device": name, "size": len(data), "file_offset": at})
            at += len(data)
            blobs.append(data)
    basic = {"ncpus": 2, "vmname": "web1", "memsize": memory_bytes, "memflags": 0}
    return {"basic metadata": basic, **lists}, b"".join(blobs)


def text_of(value: object) -> bytes:
    """Return the text of a .meta as libxo prints it, with indents."""
    return json.dumps(value, indent=2).encode() + b"\n"


def names(directory: Path) -> list[str]:
    """Return the names in a directory."""
    return sorted(os.listdir(directory))
