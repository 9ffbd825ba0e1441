"""Some cells of the fault matrix, and some kills at any moment; tests/faults/run tries all."""

from __future__ import annotations

from collections import Counter

import pytest

from cli.kinds import G4, G5, QEMU
from cli.travel import Stable

from .cells import FORMS, KINDS, POINTS, PROCESSES, Cell, cells, ends
from .runner import chosen, kills
from .trial import try_cell, try_moment

# Any other number chooses other cells.
SEED = 12
_MARKED = {"g5": G5, "g4": G4, "qemu": QEMU}
_COUNTS = {"g5": 10, "g4": 4, "qemu": 5}


def test_the_matrix_has_every_process_at_every_point() -> None:
    """What a cell needs may not exist yet, or no longer, and for nothing else a cell is missing."""
    for kind in KINDS:
        for form in FORMS:
            every = list(cells(kind, form))
            assert len(every) == len(set(every))
            killed = Counter(cell.who for cell in every if cell.fault == "SIGKILL")
            missing = {who: len(POINTS) - killed[who] for who in PROCESSES if who != "hook"}
            # The keeper starts after HELLO.  The destination's hypervisor starts after that too,
            # bhyve after a -p command, and at RUNNING it is the guest.
            late = 2 if kind == "qemu" else 3
            third = len(POINTS) if form == "command" else 0
            expected = {"keeper": 1, "destination": late, "third": third}
            assert missing == {who: expected.get(who, 0) for who in missing}
            assert killed["hook"] == 1
            assert all(ends(cell) for cell in every)


def test_a_seed_chooses_always_the_same() -> None:
    assert chosen(["g5/*"], 7, SEED) == chosen(["g5/*"], 7, SEED) != chosen(["g5/*"], 7, SEED + 1)
    assert kills(["g5"], 7, SEED) == kills(["g5"], 7, SEED) != kills(["g5"], 7, SEED + 1)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=_MARKED[kind].marks)
        for kind, count in _COUNTS.items()
        for cell in chosen([f"{kind}/*"], count, SEED)
    ],
)
def test_a_cell(cell: Cell, stable: Stable) -> None:
    try_cell(cell, stable)


@pytest.mark.parametrize(
    ("cell", "share"),
    [
        pytest.param(cell, share, id=f"{cell}/{share:.0%}", marks=_MARKED[kind].marks)
        for kind, count in (("g5", 4), ("qemu", 2))
        for cell, share in kills([kind], count, SEED)
    ],
)
def test_a_kill_at_any_moment(cell: Cell, share: float, stable: Stable) -> None:
    try_moment(cell, share, stable)
