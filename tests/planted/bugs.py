"""All bugs that are planted, by their kind."""

from __future__ import annotations

from planted import (
    bhyve,
    buttons,
    checksums,
    clocks,
    disks,
    handshake,
    hashes,
    interrupts,
    lengths,
    memory,
    parsers,
    records,
    supervised,
    urgent,
)
from planted.bug import Bug, Kind

_MODULES = (
    checksums,
    lengths,
    parsers,
    handshake,
    records,
    bhyve,
    supervised,
    memory,
    disks,
    hashes,
    clocks,
    buttons,
    urgent,
    interrupts,
)
_ORDER = list(Kind)

BUGS: tuple[Bug, ...] = tuple(
    sorted((bug for module in _MODULES for bug in module.BUGS), key=lambda b: _ORDER.index(b.kind))
)
