"""The check of a QEMU guest's sections in a stream, on any host: contents.Contents.

validate.py checks CONFIG.  The guest has one segment, its memory backend, and one
state, QEMU's own migration stream, of which only the first bytes are checked.
"""

from __future__ import annotations

from typing import Any

from bhystream.backend.qemu.state import MAX_STATE_BYTES
from bhystream.backend.qemu.validate import validate
from bhystream.errors import FormatError, IncompatibleError
from bhystream.guest import PAGE_BYTES, Json, Layout, State

STATE = "qemu"
# Source: qemu/qemu migration/savevm.h, QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION.
_MAGIC = b"QEVM\0\0\0\3"


class QemuContents:
    """contents.Contents for guests of QEMU."""

    def __init__(self) -> None:
        self._memory: dict[str, Any] = {}
        self._has_state = False

    def config(self, config: Json) -> None:
        """Check CONFIG.  Raises IncompatibleError."""
        self._memory = validate(config)["memory"]

    def layout(self, layout: Layout) -> None:
        """Check that LAYOUT is CONFIG's one memory backend.  Raises IncompatibleError."""
        if len(layout.segments) != 1:
            raise IncompatibleError(f"{len(layout.segments)} segments; QEMU guests have one")
        [segment], memory = layout.segments, self._memory
        if (segment.name, segment.npages * PAGE_BYTES) != (memory["id"], memory["size_bytes"]):
            raise IncompatibleError(
                f"segment {ascii(segment.name)[:40]} of {segment.npages} pages is not the"
                f" configuration's memory {memory['id']} of {memory['size_bytes']} bytes"
            )

    def devices(self, devices: tuple[str, ...]) -> None:
        """Do nothing: DEVICES is for people to read."""

    def plan(self, plan: bytes) -> None:
        """Do nothing: a QEMU that waits needs no plan."""

    def state(self, state: State) -> None:
        """Check the one state; ignore optional states.  Raises FormatError."""
        if state.is_optional:
            return
        if state.name != STATE:
            raise FormatError(f"state {ascii(state.name)[:40]}: QEMU has one, {STATE!r}")
        if len(state.data) > MAX_STATE_BYTES:
            raise FormatError(f"state {STATE}: more than {MAX_STATE_BYTES >> 20} MiB")
        if not state.data.startswith(_MAGIC):
            raise FormatError(f"state {STATE}: it is not a migration stream of QEMU")
        self._has_state = True

    def end(self) -> None:
        """Check that the state has come.  Raises FormatError."""
        if not self._has_state:
            raise FormatError(f"state {STATE} is missing")
