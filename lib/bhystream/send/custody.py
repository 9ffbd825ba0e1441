"""A guest in bhysend's custody: what is done to it, and what becomes of it on a failure.

handshake.SOURCE says which acts an event means; each act is done here, on the
guest, on its record and on the stream.  What may have happened is on disk
before it is done, so if this process dies, the keeper acts on the record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from bhystream import hypervisors
from bhystream.errors import BhyError, GoneError, GuestError, HeldError, InDoubtError, as_error
from bhystream.guest import GO, HELD, MOVED, PAUSED, State
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, At, Event, Machine
from bhystream.handover.standing import with_peer
from bhystream.handover.state import Record, Records
from bhystream.handover.where import Where, outcome, what_to_type
from bhystream.send.conversation import Ready
from bhystream.send.hook import Hook
from bhystream.send.job import Begun, Job
from bhystream.send.keeper import Keeper
from bhystream.send.stopwatch import Stopwatch
from bhystream.stream.format import Type
from bhystream.units import duration

# What may have failed, where the table has brought the guest.
_ACTS_OF = {At.GONE: (Act.DISCARD,), At.RUNS_ON: (Act.RESUME,)}


class Custody:
    """One guest, from before its pause until it runs here again, stands held, or is gone.

    record: of the guest, as it was written last.  states, reasons: of the
    paused guest, as Paused has them; empty before.
    """

    def __init__(self, job: Job, begun: Begun, record: Record, watch: Stopwatch) -> None:
        """Start the keeper: long before the pause, or pages change while it starts.

        record: with phase PAUSED, and not written yet.  The rest stays the
        caller's.  Raises GuestError.
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
        self._go_is_out = False
        self._has_stood = False
        self._ask_whether_paused: Callable[[], None] = self._is_not_paused
        self._resume: Callable[[], None] = self._find_and_resume
        self._machine = Machine(handshake.SOURCE, At.RUNS, self._do)
        # The pause and READY add what they make possible.
        self._acts: dict[Act, Callable[[], None]] = {
            Act.RECORD_PAUSED: self._record_paused,
            Act.RECORD_HELD: lambda: self._record(HELD),
            Act.RECORD_GO: lambda: self._record(GO),
            Act.RECORD_MOVED: self._record_moved,
            Act.FORGET: lambda: self._records.remove(self.record.id),
            Act.PAUSE: self._pause,
            Act.RESUME: self._let_run_on,
            Act.WRITE_END: self._write_end,
        }

    # What happens to the guest, in this order.

    def pause(self) -> None:
        """Record what is coming, and pause the guest with its state taken."""
        if not self._keeper.is_alive():
            self._keeper = self._start_keeper()
        self._job.source.require_described()
        self._job.signals.ignore_stops()
        self._machine.on(Event.PAUSE)

    def require_paused(self) -> None:
        """Ask the hypervisor whether it holds the guest still.  Raises GuestError if not."""
        self._ask_whether_paused()

    def wait_for_hook(self) -> None:
        """Wait until the -p command has ended well.  Raises GuestError."""
        if self._hook:
            self._hook.wait()
            self._hook = None
            self._keeper.tell_hook(0)

    def release(self) -> None:
        """Let a kept guest run on: its copy is complete."""
        self.require_paused()
        self._machine.on(Event.COPIED_KEPT)

    def hold(self) -> None:
        """Write END of the plain form: the guest is the operator's to end or to resume."""
        self.require_paused()
        self._machine.on(Event.COPIED_PLAIN)

    def offer(self) -> None:
        """Write END of the answered form, which starts nothing by itself."""
        self._machine.on(Event.COPIED)

    def go(self, ready: Ready) -> None:
        """Record GO, and write it."""
        self.record = with_peer(self.record, ready.hello)
        self._acts[Act.WRITE_GO] = lambda: self._write_go(ready.nonce)
        self._machine.on(Event.READY)

    def settle(self, event: Event) -> None:
        """Do what the answer to GO means: RUNNING, FAILED, or DOUBT."""
        self._machine.on(event)

    def dismiss_keeper(self) -> None:
        """End the keeper: the record says all, or nothing, from here on.  Twice is no error."""
        self._keeper.dismiss()

    # What a failure means.

    def recover(self, error: BhyError) -> str:
        """Bring the guest back, as far as the move has come; return where it is.

        Raises what is to be told instead of the error, where the guest does
        not simply run here: the keeper is still there then, and goes on trying
        when this process has ended, where it cannot be resumed or ended.
        """
        who = self._job.who
        if self._machine.at == At.HELD and self._begun.writer.ended:
            raise HeldError(str(error), f"{who}: held here\n{error.hint}")
        if self._hook:
            self._hook.kill()
        gone = self._undo(error)
        if isinstance(error, InDoubtError):
            raise error
        if self._machine.at == At.DOUBT:
            raise self.doubt(str(error))
        if gone:
            return "" if str(error) == str(gone) else str(gone)
        stood = f"; it stood for {duration(self._watch.pause_ns)}" if self._has_stood else ""
        return f"{who}: it runs here{stood}"

    def doubt(self, why: str) -> InDoubtError:
        """Return the error for a guest that may run at the destination."""
        hint = what_to_type(Where.DOUBT, self.record, self._job.base)
        return InDoubtError(f"{self._job.who}: in doubt: {why}", hint)

    def _undo(self, error: BhyError) -> GoneError | None:
        """Do what the table has for a failure.

        Returns what says that the guest is gone: nobody can bring it back, and
        nobody has to.  Raises what is to be told where even that failed.
        """
        gone = error if isinstance(error, GoneError) else None
        try:
            if self._machine.at in (At.GONE, At.RUNS_ON) and self._machine.undone:
                # The failure is that of the last act itself.
                raise error
            if self._machine.expects(event := self._event_of_failure()):
                self._machine.on(event)
        except GoneError as found:
            gone = found
            with contextlib.suppress(BhyError):
                self._records.remove(self.record.id)
        except Exception as raised:  # whatever it is, the guest may stand paused
            raise self._stuck(error, as_error(raised)) from raised
        self.dismiss_keeper()
        return gone

    def _event_of_failure(self) -> Event:
        """Return what a failure is, after what was recorded: could it be acted on there?"""
        at = self._machine.at
        if at == At.HELD or (at == At.COMMITTED and not self._go_is_out):
            return Event.UNSENT
        return Event.DOUBT if at == At.COMMITTED else Event.FAILURE

    def _stuck(self, error: BhyError, second: BhyError) -> BhyError:
        """Return what to say where the last act failed: the keeper takes over when we end."""
        who, undone = self._job.who, self._machine.undone
        acts = _ACTS_OF[self._machine.at]
        where = outcome(self.record.phase, acts, undone)
        match where:
            case Where.LEFT:
                return HeldError(
                    f"{who}: it runs on {self._begun.host}, and cannot be ended here: {second}",
                    what_to_type(where, self.record, self._job.base),
                )
            case Where.THERE:
                return HeldError(
                    f"{who}: it runs on {self._begun.host}, and is gone here; its record stays:"
                    f" {second}",
                    what_to_type(Where.LEFT, self.record, self._job.base),
                )
            case Where.HERE:
                error.hint = f"{who}: it runs here; {second}\n{error.hint}"
                return error
        return HeldError(
            f"{error}; and the guest cannot be resumed: {second}",
            f"{who}: its keeper goes on trying; see bhysend -l",
        )

    # The acts of handshake.SOURCE.

    def _do(self, act: Act) -> None:
        self._acts[act]()

    def _start_keeper(self) -> Keeper:
        talk = self._begun.talk
        answers = talk.route.answer_fd if talk else -1
        return Keeper(self._job.base, self.record, self._job.lock, answers)

    def _record(self, phase: str) -> None:
        self.record = replace(self.record.moved(phase), keeper=self._keeper.pid)
        self._records.write(self.record)

    def _record_paused(self) -> None:
        if self._machine.at == At.PAUSED:
            return self._record(PAUSED)
        # If bhysend dies now, its keeper has to find PAUSED.  If this write
        # fails, bhysend resumes the guest all the same.
        with contextlib.suppress(BhyError):
            self._record(PAUSED)
        return None

    def _record_moved(self) -> None:
        # Only for a keeper that has to end the guest in our place.
        with contextlib.suppress(BhyError):
            self._record(MOVED)

    def _pause(self) -> None:
        self._job.log(f"pausing, stream {self.record.id}, to {self._begun.host}")
        self._watch.start()
        self._has_stood = True
        paused = self._job.source.pause()
        self._ask_whether_paused = paused.require_paused
        self._resume = paused.resume
        self._acts[Act.DISCARD] = lambda: paused.discard(self.record.there)
        self.states, self.reasons = paused.states(), paused.reasons
        self._watch.state_ns = self._watch.elapsed_ns()
        hook = self._job.opts.hook
        if hook is not None:
            # Not before: until then the guest writes to its disks.
            name, umask = self._job.source.name, self._job.opts.umask
            self._hook = Hook(hook, name, self.record.id, umask)
            self._keeper.tell_hook(self._hook.group)

    def _is_not_paused(self) -> None:
        raise GuestError(f"{self._job.who}: it is not paused")

    def _let_run_on(self) -> None:
        self._resume()
        if self._has_stood:
            self._watch.stop()

    def _find_and_resume(self) -> None:
        """Resume a guest whose pause failed, and may not have been undone."""
        # The hypervisor may serve one client at a time.
        self._job.source.close()
        paused = hypervisors.open_paused(self.record.revive)
        try:
            paused.resume()
        finally:
            paused.close()

    def _write_end(self) -> None:
        self._begun.writer.end()
        self._watch.stop()

    def _write_go(self, nonce: bytes) -> None:
        self._begun.writer.section(Type.GO, nonce)
        self._go_is_out = True
        self._job.log(f"GO, stream {self.record.id}, to {self.record.there}")
