"""The fault matrix: who is harmed, how, and at which point of a move.

A cell is one move in an answered form that is held up at a point.  There one fault happens, and
then the move goes on, as far as it can.  ends() says where the guest may be after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FORMS = ("three-stages", "command")
KINDS = ("g5", "g4", "qemu")

# A move that nothing holds up, whose fault comes at any moment.
NOWHERE = "nowhere"
# The points of cli.attempt, in the order of a move.  At "paused" a -p command is under way; at
# READY, GO and RUNNING this message is; at the others a section of the stream.
POINTS = ("HELLO", "round-0", "paused", "state", "END", "READY", "GO", "RUNNING")
_BEFORE_READY = POINTS[:5]

# The processes of a move.  source, destination: the hypervisors.  there, back: what carries the
# stream and the answers, as ssh does.  hook: the -p command.
PROCESSES = (
    *("bhysend", "keeper", "there", "bhyrecv", "back", "third"),
    *("source", "destination", "hook"),
)
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
# Our programs, to which more happens: no more memory is to be had, no more bytes fit into a file,
# each read(2) of anything fails with EIO.
_OURS = ("bhysend", "bhyrecv", "third")
# What happens to a connection; see cli/valve.py.  A connection that is closed at both ends is one
# whose process was killed.
VALVES = ("deaf", "mute", "swallow")
# What an operator types while bhysend and bhyrecv are at work.
VERBS = ("resume", "discard", "send", "query", "resume-there", "discard-there")


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    who: one of PROCESSES, "operator", or "disk", the file system at the destination.
    """

    kind: str
    form: str
    point: str
    who: str
    fault: str

    def __str__(self) -> str:
        return "/".join((self.kind, self.form, self.point, self.who, self.fault))

    @property
    def is_lingering(self) -> bool:
        """Say whether the fault lasts, and may be noticed only at a later point."""
        return self.fault not in ("SIGKILL", "SIGTERM")


def cells(kind: str, form: str) -> Iterator[Cell]:
    """Yield every cell of a kind of guest and a form."""
    for point in POINTS:
        pairs = [(who, fault) for who in PROCESSES for fault in SIGNALS]
        pairs += [(who, fault) for who in (*_OURS, "keeper") for fault in ("memory", "file-size")]
        pairs += [("destination", "memory")]
        pairs += [(who, "EIO") for who in _OURS]
        pairs += [(who, fault) for who in ("there", "back") for fault in VALVES]
        pairs += [("disk", "full")]
        pairs += [("operator", verb) for verb in VERBS]
        for who, fault in pairs:
            if _exists(cell := Cell(kind, form, point, who, fault)):
                yield cell


def _exists(cell: Cell) -> bool:
    """Say whether there is such a process, or anything to type, at the point."""
    match cell.who:
        case "third":
            return cell.form == "three-stages"
        case "hook":
            return cell.point == "paused"
        case "keeper":
            return cell.point != "HELLO"
        case "destination":
            if cell.point == "RUNNING":
                # It is the guest now, and a guest may stand for a while, but not be killed.
                return cell.fault == "SIGSTOP"
            # With -p the disks come only at the pause, and bhyve starts after that.
            return cell.point != "HELLO" and (cell.point != "paused" or cell.kind == "qemu")
        case "operator":
            # The id, which -q and the destination's verbs need, is in bhysend -l from the pause on.
            needs_id = cell.fault == "query" or cell.fault.endswith("-there")
            return not needs_id or cell.point not in ("HELLO", "round-0")
    return True


HERE, THERE = "here", "there"
# The guest stands paused, and the command that bhysend prints finds out where the guest is.
DOUBT_HERE, DOUBT_THERE = "doubt-here", "doubt-there"
# The fault itself has ended the only copy.
GONE = "gone"
# The guest ran at the destination and was switched off there; it stands paused at the source.
OFF = "off"
_UNKNOWN = frozenset((HERE, THERE, DOUBT_HERE, DOUBT_THERE))


def ends(cell: Cell) -> frozenset[str]:
    """Return where the guest may be in the end; no cell allows two copies, or none but for GONE."""
    if cell.point == NOWHERE:
        # Whoever kills the hypervisor that has the guest by then kills the guest.
        return _UNKNOWN | {GONE, OFF} if cell.who in ("source", "destination") else _UNKNOWN
    if cell.who == "operator":
        return _after_a_verb(cell)
    if cell.who == "source" and cell.fault != "SIGSTOP":
        return _after_the_source(cell)
    if cell.who == "destination" and (found := _after_the_destination(cell)):
        return found
    if cell.who == "disk" and cell.kind == "qemu":
        # QEMU is killed when the guest touches a page for which its memory file has no room.
        return _UNKNOWN | {GONE, OFF}
    if cell.point == "RUNNING":
        return frozenset((THERE, DOUBT_THERE))
    if cell.who == "keeper" or _is_ignored(cell):
        # Nobody needs the keeper unless bhysend dies.
        return frozenset((THERE,))
    if cell.is_lingering or cell.point == "GO":
        return _UNKNOWN
    if cell.point == "READY":
        # READY is delivered, and GO may be sent to a bhyrecv that is not there any more.
        return frozenset((HERE, DOUBT_HERE))
    return frozenset((HERE,))


def _after_the_destination(cell: Cell) -> frozenset[str]:
    """A destination's hypervisor that ends may have let the guest run before; else nothing."""
    if cell.fault == "SIGTERM" and cell.kind != "qemu":
        # It presses the power button of a guest that does not run yet, and may run soon.
        return frozenset((HERE, OFF, GONE))
    if cell.fault == "memory" and cell.kind == "qemu":
        return _UNKNOWN | {GONE, OFF}  # it may end at any later time, too
    if cell.point in ("READY", "GO") and not cell.is_lingering:
        return _UNKNOWN | {GONE, OFF}
    return frozenset()


def _is_ignored(cell: Cell) -> bool:
    """Say whether SIGTERM is ignored, as by the command that brings RUNNING back to bhysend.

    A bhysend -A ignores SIGTERM from the first answer on.
    """
    if (cell.who, cell.point) == ("third", "HELLO"):
        return False
    ignoring = {"command": ("there", "bhyrecv", "back"), "three-stages": ("third",)}
    return cell.fault == "SIGTERM" and cell.who in ignoring[cell.form]


def _after_a_verb(cell: Cell) -> frozenset[str]:
    """Nothing that is typed while a move goes on disturbs it, but the question how it went."""
    if cell.fault == "query" and cell.point != "RUNNING":
        return frozenset((HERE,) if cell.point in ("READY", "GO") else (HERE, THERE))
    return frozenset((THERE,))


def _after_the_source(cell: Cell) -> frozenset[str]:
    """A source's hypervisor that ends takes the guest along, until the destination has it all."""
    if cell.point in ("READY", "GO", "RUNNING"):
        found = {THERE}
    elif cell.point in ("state", "END"):
        # bhysend may have been ahead of the point.
        found = {THERE, GONE}
    else:
        found = {GONE}
    if cell.fault == "SIGTERM" and cell.point != "HELLO":
        # It presses bhyve's power button, and what the guest does then takes its time.
        found |= {HERE, THERE, GONE}
    return frozenset(found)
