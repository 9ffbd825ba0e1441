"""The words in which everything here speaks of a guest.

Page numbers count through the segments of the layout in order, as in the
LAYOUT section of bhystream(5): page 0 is the first page of segment 0, and the
first page of segment 1 follows the last of segment 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAGE_BYTES = 4096

GUEST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
# What a guest may have, and can still be moved: the caps of bhystream(5).
MAX_GUEST_PAGES = 1 << 36
MAX_STATE_BYTES = 128 << 20
MAX_OPTIONAL_STATE_BYTES = 4 << 20

# What a record says of the guest; these words are in the records, and in -l.
PAUSED = "paused"  # source: stopped, and nothing out that could start it elsewhere
HELD = "held"  # source, plain form: END may be out; only the operator resumes it
GO = "in-doubt"  # source: GO may be out
MOVED = "moved"  # source: it runs at the destination; what is here is to be ended
LOADED = "loaded"  # destination: bhyrecv -u left it paused
READY = "ready"  # destination: verified and loaded; waits for GO
STARTED = "started"  # destination: it was, or may have been, started
DEAD = "dead"  # destination: never ran and never will, from this stream
PHASES = (PAUSED, HELD, GO, MOVED, LOADED, READY, STARTED, DEAD)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """One contiguous piece of the guest's memory.

    name: at most 31 ASCII bytes.  gpa: guest physical address in bytes, or
    None where the hypervisor does not state one.  npages: pages of 4 KiB.
    """

    name: str
    gpa: int | None
    npages: int


@dataclass(frozen=True)
class Head:
    """What cannot change while the guest runs: the head sections of a stream.

    host: the sending host and its hypervisor.  config: the guest.  devices:
    names of the emulated devices, in the hypervisor's order.
    """

    host: Json
    layout: tuple[Segment, ...]
    config: Json
    devices: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """One named blob of device or vCPU state, opaque to the engine.

    is_optional: a reader that does not know it may leave it out.
    """

    name: str
    data: bytes
    is_optional: bool = False
