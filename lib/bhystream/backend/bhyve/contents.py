"""What a stream says of a bhyve guest, checked on any host: contents.Contents.

The rules are in bhystream(5), GUESTS OF BHYVE.  Each section is checked by
itself, and against the sections before it: LAYOUT, DEVICES, REHEARSAL and the
states have to fit CONFIG.  verdict.py says whether a host can take such a guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from bhystream.backend.bhyve import clocks, fpu, snapshot
from bhystream.backend.bhyve.config import devices as devices_of
from bhystream.backend.bhyve.keys import shown
from bhystream.backend.bhyve.layout import layout_of
from bhystream.backend.bhyve.snapshot import Meta
from bhystream.backend.bhyve.validate import is_bare, validate
from bhystream.errors import FormatError, GuestError, IncompatibleError
from bhystream.guest import Json, Layout, State


class BhyveContents:
    """contents.Contents for guests of bhyve and of its stand-in."""

    def __init__(self) -> None:
        self._section: Mapping[str, Any] = {}
        self._devices: tuple[str, ...] = ()
        self._planned: Meta | None = None
        self._order = snapshot.Order()

    def config(self, config: Json) -> None:
        """Check CONFIG.  Raises IncompatibleError for what validate.py does not allow."""
        self._section = validate(config, may_be_bare=True)

    def layout(self, layout: Layout) -> None:
        """Compare LAYOUT with CONFIG.  Raises IncompatibleError if the two differ."""
        size = int(self._section["keys"]["memory.size"])
        if layout != layout_of(size):
            raise IncompatibleError(f"the segments are not those of memory.size={size}")

    def devices(self, devices: tuple[str, ...]) -> None:
        """Compare DEVICES with CONFIG, if CONFIG names any device.

        Raises IncompatibleError if the two differ.
        """
        self._devices = devices
        if is_bare(self._section):
            return
        if other := _difference(devices, devices_of(self._section)):
            raise IncompatibleError(
                f"it and CONFIG do not agree on {other}",
                "send it with the configuration that the guest runs with",
            )

    def plan(self, plan: bytes) -> None:
        """Compare REHEARSAL with CONFIG and DEVICES.  Raises FormatError if they differ."""
        self._planned = snapshot.parse(plan)
        self._require_ours(self._planned)

    def state(self, state: State) -> None:
        """Check that a state is meta, or the next state that meta lists; check meta itself.

        An optional state is checked if its name is known.  Raises FormatError.
        """
        if not state.is_optional:
            self._order.take(state)
            if state.name == snapshot.META and self._order.meta is not None:
                self._require_ours(self._order.meta)
                if self._planned is not None:
                    snapshot.require_same(self._planned, self._order.meta)
        elif snapshot.fpu_states([state]):
            self._require_fpu(state)
        else:
            clocks.ran_on_ns([state])

    def end(self) -> None:
        """Check that every state that meta lists has come.  Raises FormatError."""
        self._order.end()

    def _require_ours(self, meta: Meta) -> None:
        """Compare a FILE.meta with the head.  Raises FormatError if the two differ."""
        keys = self._section["keys"]
        if meta.memory_bytes != int(keys["memory.size"]):
            raise FormatError(f"meta: memsize is {meta.memory_bytes}, not memory.size")
        if meta.ncpus != int(keys["cpus"]):
            raise FormatError(f"meta: ncpus is {meta.ncpus}, not cpus")
        if other := _difference(meta.devices, self._devices):
            raise FormatError(f"meta: it and DEVICES do not agree on {other}")

    def _require_fpu(self, state: State) -> None:
        ncpus = int(self._section["keys"]["cpus"])
        try:
            vcpu, _, _ = fpu.parse(state)
        except GuestError as error:
            raise FormatError(str(error)) from None
        if vcpu >= ncpus:
            raise FormatError(f"state {state.name}: the guest has {ncpus} vCPUs")


def _difference(some: Iterable[str], others: Iterable[str]) -> str:
    """Return a device that only one of two lists has, in printable form; "" if there is none.

    FreeBSD 14's bhyve may leave hostbridge out, which has no state to save.
    """
    a, b = (
        Counter(name for name in names if not name.startswith("hostbridge@"))
        for names in (some, others)
    )
    return shown(min([*(a - b), *(b - a)])) if a != b else ""
