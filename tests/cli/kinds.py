"""The kinds of guests that a test runs with, and the guests themselves.

A test that asks for a fixture `small` or `proof` runs once for each kind of its file, or of its
parametrize("kind", ...).  The stand-in's guests are quick, so they run in every case.  QEMU's are
slow, and run in a selection that includes every case that only QEMU can show.  If
BHYSEND_TEST_EVERY is set, both run in every case.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from guest import Spec
from standin import rig

from .qemu import QemuTraveller
from .standin import StandinSpec, StandinTraveller, standin
from .travel import Stable, Traveller

QEMU = pytest.param("qemu", marks=pytest.mark.guest)
G5 = pytest.param("g5", marks=pytest.mark.standin)
G4 = pytest.param("g4", marks=pytest.mark.standin)

EVERY = "BHYSEND_TEST_EVERY" in os.environ

# For tests of the engine, in which every hypervisor behaves alike: the quick stand-in is enough.
ANY = pytest.mark.parametrize("kind", [G5, QEMU] if EVERY else [G5])

# A guest whose moves are quick: it has little memory, and changes much of it.
SMALL = Spec(
    "microvm",
    memory_mib=128,
    proof={"mib": 32, "work": 16, "holes": 2, "rate": 16, "sweep": 100},
)
# These keys would otherwise differ between hosts; an operator sets them to move a guest.
_SAID = {
    "uuid": "11111111-2222-3333-4444-555555555555",
    "pci.0.3.0.ser": "BHYVE-1",
    "pci.0.4.0.mac": "00:a0:98:11:22:33",
}
_SMALL_STANDIN = rig.Spec(
    touched="10M", working_set="2M", rate="16M", keys={**_SAID, "standin.sweep_rate": "64M"}
)
# This guest rewrites tens of MiB each second.
PROOF = Spec()
_PROOF_STANDIN = rig.Spec(
    memory="512M",
    touched="48M",
    working_set="12M",
    rate="32M",
    keys={**_SAID, "standin.sweep_rate": "96M"},
)
# This guest has memory above 4 GiB, and touches little of its memory.
_LARGE_STANDIN = rig.Spec(
    memory="4608M",
    touched="16M",
    working_set="2M",
    rate="8M",
    keys={**_SAID, "standin.sweep_rate": "64M"},
)


def small(kind: str, stable: Stable) -> Traveller:
    """Lend the guest whose moves are quick."""
    return _lend(kind, stable, "small", SMALL, StandinSpec(_SMALL_STANDIN, 64))


def proof(kind: str, stable: Stable) -> Traveller:
    """Lend the guest that rewrites tens of MiB each second."""
    return _lend(kind, stable, "proof", PROOF, StandinSpec(_PROOF_STANDIN, 512))


def large(kind: str, stable: Stable) -> StandinTraveller:
    """Lend the stand-in's guest with memory above 4 GiB."""
    spec = StandinSpec(_LARGE_STANDIN, 4608)
    return standin(stable.lend(f"{kind} large", partial(StandinTraveller, generation(spec, kind))))


def own(kind: str, **settings: Any) -> StandinTraveller:
    """Boot a small guest of the stand-in for one test only.  settings: of the guest's hosts."""
    spec = generation(StandinSpec(_SMALL_STANDIN, 64), kind)
    return StandinTraveller(replace(spec, settings=settings))


def _lend(kind: str, stable: Stable, name: str, ours: Spec, theirs: StandinSpec) -> Traveller:
    if kind == "qemu":
        return stable.lend(f"{kind} {name}", partial(QemuTraveller, ours))
    return stable.lend(f"{kind} {name}", partial(StandinTraveller, generation(theirs, kind)))


def generation(spec: StandinSpec, kind: str) -> StandinSpec:
    """Return the spec with the generation of this kind."""
    return StandinSpec(spec.guest, spec.memory_mib, int(kind.removeprefix("g")))


def matrix(
    rows: Sequence[Any],
    qemu: Sequence[Any],
    *,
    g5: Sequence[Any] | None = None,
    also: Sequence[Any] = (),
) -> list[Any]:
    """Return the parameters (kind, *row): all rows for G5, some for QEMU; with EVERY all for both.

    rows: tuples; if there are none, the rows of the other arguments are all rows.  qemu: the rows
    that are enough for QEMU.  g5: the rows for G5, None for all.  also: the rows that also run
    for G4.
    """
    is_all = EVERY and bool(rows)
    found = [(G5, row) for row in (rows if is_all or g5 is None else g5)]
    found += [(G4, row) for row in also]
    found += [(QEMU, row) for row in (rows if is_all else qemu)]
    return [
        pytest.param(
            kind.values[0], *row, marks=kind.marks, id="-".join(map(str, (kind.values[0], *row)))
        )
        for kind, row in found
    ]
