"""Where a guest is, by its record and by the acts done: each cell of the table, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bhystream.errors import GuestError
from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover import handshake
from bhystream.handover.handshake import Act
from bhystream.handover.state import Record
from bhystream.handover.where import Where, outcome, unfinished, what_to_type

RESUME, DISCARD = (Act.RESUME, Act.FORGET), (Act.RECORD_MOVED, Act.DISCARD, Act.FORGET)
FORGET = (Act.FORGET,)
ID = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("phase", "acts", "undone", "where"),
    [
        (PAUSED, RESUME, (), Where.HERE),
        (PAUSED, RESUME, RESUME, Where.STANDS),
        (PAUSED, RESUME, FORGET, Where.HERE),
        (PAUSED, (), (), Where.STANDS),
        (HELD, RESUME, (), Where.HERE),
        (HELD, RESUME, RESUME, Where.STANDS),
        (HELD, (), (), Where.HELD),
        (GO, RESUME, (), Where.HERE),
        (GO, RESUME, RESUME, Where.STANDS),
        (GO, DISCARD, (), Where.THERE),
        (GO, DISCARD, DISCARD, Where.LEFT),
        (GO, DISCARD, DISCARD[1:], Where.LEFT),
        (GO, DISCARD, FORGET, Where.THERE),
        (GO, (), (), Where.DOUBT),
        (MOVED, DISCARD[1:], (), Where.THERE),
        (MOVED, DISCARD[1:], DISCARD[1:], Where.LEFT),
        (MOVED, (), (), Where.LEFT),
    ],
)
def test_where_a_guest_is(
    phase: str, acts: Sequence[Act], undone: Sequence[Act], where: Where
) -> None:
    assert outcome(phase, acts, undone) == where


@pytest.mark.parametrize(("found", "acts"), handshake.RECORD.items())
def test_what_is_done_to_a_record_leaves_its_guest_at_one_host(
    found: tuple[str, handshake.Event], acts: tuple[Act, ...]
) -> None:
    """If the act on the guest fails, the guest stands here, and the operator is told what to do."""
    assert outcome(found[0], acts) in (Where.HERE, Where.THERE)
    assert outcome(found[0], acts, acts) in (Where.STANDS, Where.LEFT)


@pytest.mark.parametrize(
    ("where", "lines"),
    [
        (Where.HERE, []),
        (Where.THERE, []),
        (Where.STANDS, [f"let it run on: bhysend --resume {ID}"]),
        (
            Where.HELD,
            [
                f"if it runs at the destination: bhysend --discard {ID}",
                f"if it surely does not: bhysend --resume {ID}",
            ],
        ),
        (Where.LEFT, [f"end what is left here: bhysend --discard {ID}"]),
    ],
)
def test_what_to_type(where: Where, lines: list[str]) -> None:
    record = Record(ID, "web1", "web1", "bhyve-web1", PAUSED, {})
    assert what_to_type(where, record, Path("/s")).splitlines() == lines
    named = what_to_type(where, record, Path("/s"), "web1").splitlines()
    assert named == [line.replace(ID, "web1") for line in lines]


@pytest.mark.parametrize(
    ("phase", "acts", "undone", "text", "hint"),
    [
        (
            PAUSED,
            RESUME,
            RESUME,
            "it stands paused here, and cannot be resumed: no",
            f"let it run on: bhysend --resume {ID}",
        ),
        (
            PAUSED,
            RESUME,
            FORGET,
            "it runs here; its record stays: no",
            f"let it run on: bhysend --resume {ID}",
        ),
        (
            GO,
            (Act.RECORD_PAUSED, *RESUME),
            (Act.RECORD_PAUSED, *RESUME),
            "it stands paused here, and cannot be resumed: no",
            f"let it run on: bhysend --resume --in-doubt {ID}",
        ),
        (
            GO,
            DISCARD,
            DISCARD[1:],
            "it runs on hv2, and cannot be ended here: no",
            f"end what is left here: bhysend --discard {ID}",
        ),
        (
            MOVED,
            DISCARD[1:],
            FORGET,
            "it runs on hv2, and is gone here; its record stays: no",
            f"end what is left here: bhysend --discard {ID}",
        ),
    ],
)
def test_what_is_said_where_an_act_has_failed(
    phase: str, acts: Sequence[Act], undone: Sequence[Act], text: str, hint: str
) -> None:
    record = Record(ID, "web1", "web1", "bhyve-web1", phase, {}, host="hv2/a1", directory="/d")
    found = unfinished(record, acts, undone, GuestError("no"), Path("/s"))
    assert (found.text, found.hint) == (text, hint)
    unnamed = record._replace(host="")
    assert unfinished(unnamed, acts, undone, GuestError("no"), Path("/s"), "hv2") == found
