"""What a move that failed means for its guest, and what the operator is told.

handshake.SOURCE says what is done; it depends on how far the move has come.
What is said here is where the guest is, whatever failed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from bhystream.errors import BhyError, GoneError, HeldError, InDoubtError
from bhystream.handover.handshake import Act, At, Event
from bhystream.handover.standing import in_doubt
from bhystream.units import duration

if TYPE_CHECKING:
    from bhystream.send.move import Move


def recover(move: Move, error: BhyError) -> BhyError:
    """Do what a failure means for the guest; return the error, with where the guest is.

    Where the guest cannot be resumed, or ended, the keeper is still there
    and goes on trying when we have ended.
    """
    name = move.source.name
    machine = move.machine
    if machine.at == At.HELD and move.writer and move.writer.ended:
        return HeldError(str(error), f"guest {name}: held here\n{error.hint}")
    if move.hook:
        move.hook.kill()
    if stuck := _undo(move, error):
        return stuck
    if isinstance(error, InDoubtError):
        return error
    if machine.at == At.DOUBT:
        return InDoubtError(f"guest {name}: in doubt: {error}", in_doubt(move.record, move.base))
    where = f"guest {name}: it runs here"
    if move.stood_ns:
        where += f"; it stood for {duration(move.stood_ns)}"
    if move.gone:
        where = "" if str(error) == str(move.gone) else str(move.gone)
    if move.writer:
        move.writer.abort(error.status, str(error))
    if move.offer and error is not move.unrecorded:
        # Only now: the guest does not wait for it.  A disk of ours is
        # nothing that anybody there could explain.
        error = move.offer.explain(error)
    error.hint = f"{where}\n{error.hint}"
    return error


def _undo(move: Move, error: BhyError) -> BhyError | None:
    """Do what the table has for a failure; return what to say where even that failed."""
    machine = move.machine
    if machine.at in (At.GONE, At.RUNS_ON) and machine.undone:
        return _stuck(move, error, error)
    if isinstance(error, GoneError):
        move.gone = error
    try:
        if machine.expects(event := _event_of_failure(move)):
            machine.on(event)
    except GoneError as gone:
        # Nobody can bring it back, and nobody has to.
        move.gone = gone
        with contextlib.suppress(BhyError):
            move.records.remove(move.record.id)
    except BhyError as second:
        return _stuck(move, error, second)
    move.dismiss_keeper()
    return None


def _event_of_failure(move: Move) -> Event:
    """Return what a failure is, after what was recorded: could it be acted on there?"""
    at = move.machine.at
    if at == At.HELD or (at == At.COMMITTED and not move.go_is_out):
        return Event.UNSENT
    return Event.DOUBT if at == At.COMMITTED else Event.FAILURE


def _stuck(move: Move, error: BhyError, second: BhyError) -> BhyError:
    """Return what to say where the last act failed: the keeper takes over when we end."""
    name = move.source.name
    if move.machine.at == At.GONE:
        assert move.offer is not None
        return HeldError(
            f"guest {name}: it runs on {move.offer.host}, and cannot be ended here: {second}",
            f"end it: bhysend --discard {move.record.id}",
        )
    if Act.RESUME not in move.machine.undone:
        error.hint = f"guest {name}: it runs here; {second}\n{error.hint}"
        return error
    return HeldError(
        f"{error}; and the guest cannot be resumed: {second}",
        f"guest {name}: its keeper goes on trying; see bhysend -l",
    )
