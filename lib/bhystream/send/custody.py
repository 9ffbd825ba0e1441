"""A guest in bhysend's custody: the acts on the guest, and what a failure means for the guest.

handshake.SOURCE says which acts an event needs; Custody does each act, on the
guest, on its record or on the stream.  The record is on disk before the act that
it speaks of, so if bhysend dies at any point, the keeper can act on the record.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bhystream import hypervisors
from bhystream.backend.base import Paused
from bhystream.errors import (
    BhyError,
    GuestEndedError,
    GuestError,
    HeldError,
    InDoubtError,
    InternalError,
    StaleError,
    as_error,
)
from bhystream.guest import GO, HELD, MOVED, PAUSED, State
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, Event, Machine, SourceState
from bhystream.handover.recorded import with_peer
from bhystream.handover.state import Record, Records
from bhystream.handover.where import Where, unfinished, what_to_type
from bhystream.send.conversation import Ready
from bhystream.send.hook import Hook
from bhystream.send.job import Begun, SendJob
from bhystream.send.keeper import Keeper
from bhystream.send.rounds import STALL_SECONDS
from bhystream.send.stopwatch import Stopwatch
from bhystream.stream.format import Type
from bhystream.units import duration

# The act on the guest that leads to this state, and that may have failed.
_ACTS_OF = {SourceState.RUNS_THERE: (Act.DISCARD,), SourceState.RUNS_HERE: (Act.RESUME,)}
_PHASES = {Act.RECORD_HELD: HELD, Act.RECORD_GO: GO}
_STANDS = (SourceState.PAUSED, SourceState.OFFERED)


@dataclass(frozen=True)
class Recovered:
    """The outcome of recover().

    instead: the error to report instead of the failure, if the guest does not
    simply run here; None if the guest runs here, or has ended.
    where: the line that says where the guest is; "" if the error says so.
    """

    where: str = ""
    instead: BhyError | None = None


class Custody:
    """One guest, from before its pause until it runs here again, stands held, or is gone.

    record: the guest's record, in its latest form.  states, reasons: of the paused
    guest, as Paused has them; empty before the pause.

    Custody owns the keeper, which watches this process, and the -p command.
    hold(), release() and settle() end the keeper, and so does recover(), unless
    the guest still needs the keeper.
    """

    def __init__(self, job: SendJob, begun: Begun, record: Record, watch: Stopwatch) -> None:
        """Start the keeper, long before the pause: pages change while the keeper starts.

        record: with phase PAUSED, and not written yet.  job, begun and watch stay the
        caller's.  Raises GuestError if the keeper does not start; the guest runs on.
        """
        self._job = job
        self._begun = begun
        self._watch = watch
        self._records = Records(job.base, "source")
        self.record = record
        self.states: Sequence[State] = ()
        self.reasons: Sequence[str] = ()
        self._keeper = self._start_keeper()
        self._hook: Hook | None = None
        self._paused: Paused | None = None
        self._has_stood = False
        self._nonce = b""
        self._answer = ""
        self._go_is_out = False
        self._machine = Machine(handshake.SOURCE, SourceState.RUNS, self._do)

    # What happens to the guest, in this order.

    def throttle(self) -> None:
        """Record PAUSED, because from now on the guest may stand at any moment (--throttle).

        Raises what pause() raises; the guest was not touched then.
        """
        self._require_keeper()
        self._job.signals.ignore_stops()
        self._machine.on(Event.THROTTLE)

    def pause(self) -> None:
        """Record PAUSED, pause the guest, and take its state.

        Raises GuestError if no keeper starts, AccessError or InputOutputError if PAUSED
        cannot be recorded, and what require_described() and Source.pause() raise.
        recover() then undoes what was done, a half-done pause included.
        """
        self._require_keeper()
        self._job.source.require_described()
        self._job.signals.ignore_stops()
        self._machine.on(Event.PAUSE)

    def await_room(self) -> None:
        """Wait until the pipe takes END or GO at once.  Raises InputOutputError if it does not.

        Called before require_paused(), while a signal or a failure still resumes the guest:
        once END or GO is recorded, a full pipe would leave the guest paused.
        """
        self._begun.writer.await_room(STALL_SECONDS)

    def require_paused(self) -> None:
        """Ask the hypervisor whether the guest is still paused.

        Raises GuestEndedError if the guest has ended, and another GuestError if the
        guest runs or its hypervisor fails.
        """
        self._stands().require_paused()

    def wait_for_hook(self) -> None:
        """Wait until the -p command has ended.  Raises GuestError unless its status is 0."""
        if self._hook:
            start_ns = time.monotonic_ns()
            self._hook.wait()
            self._watch.note(hook_ns=time.monotonic_ns() - start_ns)
            # If wait() raises, _hook stays set, so that recover() kills the command's group.
            self._hook = None
            self._keeper.tell_hook(0)

    def release(self) -> None:
        """Let a kept guest run on: its last pages are sent, and bhysend has its state.

        Raises what require_paused() and Paused.resume() raise, and InputOutputError.
        """
        self.require_paused()
        self._machine.on(Event.COPIED_KEPT)
        self._keeper.dismiss()

    def hold(self) -> None:
        """Record HELD and write END of the plain form.

        From END on the destination may start the guest, so only the operator ends or
        resumes it here.  If END is not written whole, recover() resumes the guest.
        Raises what require_paused() raises, AccessError and InputOutputError.
        """
        self.require_paused()
        self._machine.on(Event.COPIED_PLAIN)
        self._begun.writer.sync()
        self._keeper.dismiss()

    def offer(self) -> None:
        """Write END of the answered form.  Raises InputOutputError.

        END starts nothing by itself, so the guest is still resumed on any failure.
        """
        self._machine.on(Event.COPIED)

    def go(self, ready: Ready) -> None:
        """Record GO and the destination's name, then write GO.

        From the record on, recover() resumes the guest only if GO is not written
        whole, and settle() only on FAILED.  Raises AccessError, InputOutputError.
        """
        self.record = with_peer(self.record, ready.hello)
        self._nonce = ready.nonce
        self._machine.on(Event.READY)

    def settle(self, event: Event, answer: str) -> None:
        """Do what the answer to GO means.

        event: RUNNING ends the guest here, FAILED resumes the guest, and DOUBT leaves
        the guest paused, and its record in GO.  answer: what the destination says, for
        the message if an act fails.  Raises what an act raises; the keeper then stays
        alive until recover().
        """
        self._answer = answer
        self._machine.on(event)
        # The record says all that is known, or is gone: the keeper has nothing left to do.
        self._keeper.dismiss()

    # What a failure means.

    def recover(self, error: BhyError) -> Recovered:
        """Bring the guest back, if the state of the move allows that; return the outcome.

        If an act fails (to resume or end the guest, to remove the record), the keeper
        stays alive, and goes on trying after bhysend has ended.
        """
        who = self._job.who
        if self._machine.at == SourceState.HELD and self._begun.writer.ended:
            # END is out, so the destination may run the guest: leave the guest paused.
            self._keeper.dismiss()
            hint = what_to_type(Where.HELD, self.record, self._job.base)
            held = HeldError(str(error), f"{who}: held here\n{hint}\n{error.hint}")
            return Recovered(instead=held)
        if self._hook:
            # The command belongs to a move that is over; end it before the guest runs.
            self._hook.kill()
        ran = self._who_let_it_run(error)
        try:
            ended = self._undo(error)
        except Exception as raised:  # any kind: the guest may stand paused
            # The keeper is not dismissed: it acts on the record when bhysend ends.
            return Recovered(instead=self._stuck(error, as_error(raised)))
        self._keeper.dismiss()
        if isinstance(error, InDoubtError):
            return Recovered(instead=error)
        if self._machine.at == SourceState.DOUBT:
            return Recovered(instead=self.doubt(str(error)))
        if ended:
            return Recovered("" if str(error) == str(ended) else str(ended))
        stood = f"; it was paused for {duration(self._watch.pause_ns)}" if self._has_stood else ""
        return Recovered("\n".join([*ran, f"{who}: it runs here{stood}"]))

    def close(self) -> None:
        """Release the connection to the hypervisor; the guest stays as it is.

        A keeper that recover() has left ends only after it has acted.  May be called twice.
        """
        if self._paused:
            self._paused.close()

    def doubt(self, why: str) -> InDoubtError:
        """Return the error for a guest that may run at the destination, and what to type."""
        hint = what_to_type(Where.DOUBT, self.record, self._job.base)
        return InDoubtError(f"{self._job.who}: in doubt: {why}", hint)

    def _who_let_it_run(self, error: BhyError) -> list[str]:
        """Return the lines that say that another program let the paused guest run, if it did.

        The failure may be what follows: the destination finds that a page is not what was sent.
        """
        if self._paused and self._machine.at in _STANDS and not isinstance(error, StaleError):
            try:
                self._paused.require_paused()
            except StaleError as stale:
                return [str(stale), *filter(None, [stale.hint])]
            except Exception:  # any kind: what counts now is that the guest is resumed
                pass
        return []

    def _undo(self, error: BhyError) -> GuestEndedError | None:
        """Do what the table says for a failure.

        Returns the error that says that the guest has ended, else None: nobody can
        bring an ended guest back.  Raises what an act raises, and `error` again if
        an act of the last event has raised it.
        """
        ended = error if isinstance(error, GuestEndedError) else None
        try:
            if (
                self._machine.at in (SourceState.RUNS_THERE, SourceState.RUNS_HERE)
                and self._machine.undone
            ):
                # An act of the last event has raised `error`: the table has no other act.
                raise error
            if self._machine.expects(event := self._event_of_failure()):
                self._machine.on(event)
        except GuestEndedError as found:
            ended = found
            # If the record stays, the next bhysend finds its guest gone, and removes it.
            with contextlib.suppress(BhyError):
                self._records.remove(self.record.id)
        return ended

    def _event_of_failure(self) -> Event:
        """Return the event that a failure is, by what may have reached the destination.

        UNSENT: HELD or GO is recorded, but what it announces was not written whole, so
        the destination cannot act on it.  DOUBT: GO is out.  FAILURE: anything else.
        """
        at = self._machine.at
        if at == SourceState.HELD or (at == SourceState.COMMITTED and not self._go_is_out):
            return Event.UNSENT
        return Event.DOUBT if at == SourceState.COMMITTED else Event.FAILURE

    def _stuck(self, error: BhyError, second: BhyError) -> BhyError:
        """Return what to say if the act that a failure calls for has failed itself.

        The keeper stays: it acts when this process ends.  error: the failure.  second:
        what the act raised, which may be the failure itself.
        """
        found = unfinished(
            self.record,
            _ACTS_OF[self._machine.at],
            self._machine.undone,
            second,
            self._job.base,
            self._begun.host,
        )
        who = self._job.who
        if second is error and self._answer:
            error = GuestError(self._answer)
        if found.where == Where.HERE:
            error.hint = f"{who}: {found.text}\n{found.hint}\n{error.hint}"
            return error
        if found.where in (Where.LEFT, Where.THERE):
            return HeldError(f"{who}: {found.text}", found.hint)
        text = f"{who}: {found.text}"
        if second is not error:
            text = f"{error}; and the guest cannot be resumed: {second}"
        if self.record.phase != PAUSED:
            # The keeper, which acts on the record, has no right to resume such a guest.
            return HeldError(text, f"{who}: {found.hint}")
        return HeldError(text, f"{who}: its keeper goes on trying; see bhysend -l")

    # The acts of handshake.SOURCE.

    def _do(self, act: Act) -> None:
        match act:
            case Act.RECORD_PAUSED:
                self._record_paused()
            case Act.RECORD_HELD | Act.RECORD_GO:
                self._record(_PHASES[act])
            case Act.RECORD_MOVED:
                self._record_moved()
            case Act.FORGET:
                self._records.remove(self.record.id)
            case Act.PAUSE:
                self._pause()
            case Act.RESUME:
                self._resume()
            case Act.DISCARD:
                self._stands().discard(self.record.there)
            case Act.WRITE_END:
                self._write_end()
            case Act.WRITE_GO:
                self._write_go()
            case _:
                raise InternalError(f"bhysend cannot {act.value}")

    def _stands(self) -> Paused:
        """Return the paused guest.  Raises GuestError if the guest is not paused."""
        if self._paused is None:
            raise GuestError(f"{self._job.who}: it is not paused")
        return self._paused

    def _start_keeper(self) -> Keeper:
        talk = self._begun.talk
        answers = talk.route.answer_fd if talk else -1
        return Keeper(self._job.base, self.record, self._job.lock, answers)

    def _require_keeper(self) -> None:
        """Start another keeper if the keeper is dead.  Raises GuestError if that fails."""
        # Without a keeper nobody would resume the guest if bhysend died.
        if not self._keeper.is_alive():
            self._keeper.dismiss()
            self._keeper = self._start_keeper()

    def _record(self, phase: str) -> None:
        changed = self.record.with_phase(phase)._replace(
            keeper=self._keeper.pid, throttled=self._machine.at == SourceState.THROTTLED
        )
        self._records.write(changed)
        self.record = changed

    def _record_paused(self) -> None:
        if self._machine.at in (SourceState.PAUSED, SourceState.THROTTLED):
            # If this write fails, the guest is not paused.
            self._record(PAUSED)
        else:
            # If bhysend dies now, its keeper has to find PAUSED.  If this write
            # fails, bhysend resumes the guest all the same.
            with contextlib.suppress(BhyError):
                self._record(PAUSED)

    def _record_moved(self) -> None:
        # MOVED is for a keeper that has to end the guest in bhysend's place.  If this
        # write fails, bhysend ends the guest all the same.
        with contextlib.suppress(BhyError):
            self._record(MOVED)

    def _pause(self) -> None:
        self._job.log(f"pausing, stream {self.record.id}, to {self._begun.host}")
        self._watch.start()
        self._has_stood = True
        # If pause() raises, _paused stays None, and _resume() finds the guest by its record.
        paused = self._paused = self._job.source.pause(self._watch.start)
        self.states, self.reasons = paused.states(), paused.reasons
        self._watch.note(state_ns=self._watch.elapsed_ns())
        hook = self._job.opts.hook
        if hook is not None:
            # Start the command only now: until the pause the guest writes to its disks.
            # recover() kills the command, or the keeper does if bhysend dies.
            name, umask = self._job.source.name, self._job.opts.umask
            self._hook = Hook(hook, name, self.record.id, umask)
            self._keeper.tell_hook(self._hook.group)
            self._hook.begin()

    def _resume(self) -> None:
        if self._paused:
            self._paused.resume()
        else:
            self._find_and_resume()
        if self._has_stood:
            self._watch.stop()

    def _find_and_resume(self) -> None:
        """Resume a guest whose pause() failed, and may have left the guest paused."""
        # A hypervisor may serve only one client at a time: give up the source's connection.
        self._job.source.close()
        paused = hypervisors.open_paused(self.record.revive)
        try:
            paused.resume()
        finally:
            paused.close()

    def _write_end(self) -> None:
        self._begun.writer.end()
        self._watch.stop()

    def _write_go(self) -> None:
        self._begun.writer.section(Type.GO, self._nonce)
        # If section() raises, GO is cut, and no destination acts on it: UNSENT.
        self._go_is_out = True
        self._job.log(f"GO, stream {self.record.id}, to {self.record.there}")
