"""bhysend(8): options, the move from beginning to end, and its one error handler.

A move is one flat list of steps, in Move.run().  What a failure means for the
guest depends on how far the list has come, not on what failed:

    before the pause       the guest was never touched
    paused                 Move.recover() resumes it; if we are killed, the keeper
    HELD is recorded       it stays paused: END may have arrived
    kept, copy complete    it runs again already

The record says HELD, durably, before END's first byte is written.  If END was
not written whole (the receiver died), the destination cannot have verified it:
the record goes back and the guest is resumed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bhystream import format as fmt
from bhystream import hold, hypervisors, options, state
from bhystream.backend.base import Source
from bhystream.errors import HELD, OK, BhyError, DowntimeError, HeldError, UsageError, as_error
from bhystream.format import Feature, Form, Header, Type
from bhystream.hook import Hook
from bhystream.keeper import Keeper
from bhystream.precopy import Decision, Limits, Round, decide, outlook
from bhystream.report import Console, Progress, duration, size
from bhystream.signals import Signals
from bhystream.transfer import Transfer, write_head
from bhystream.writer import Writer

USAGE = """\
usage: bhysend [-fknPv] [-B rate] [-d time] [-p command] [-r rounds] [-T time]
               [-z level] guest
       bhysend -l [guest]
       bhysend --discard guest | --resume guest"""

_STDOUT = 1
# Of a transport that takes nothing while the guest is paused.
_STALL_SECONDS = 30


@dataclass
class Options:
    """The command line, parsed."""

    guest: str
    limits: Limits
    keep: bool = False
    dry_run: bool = False
    machine: bool = False
    verbose: bool = False
    command: str | None = None
    level: int | None = None


class Phase(Enum):
    """How far a move has come, by what it means for the guest."""

    RUNNING = "the guest runs"
    PAUSED = "paused, to be resumed on any failure"
    HELD = "END may be out: paused, for the operator to decide"
    RELEASED = "kept: it runs again"


def parse_options(argv: Sequence[str]) -> Options | hold.Verb:
    """Parse the command line.  Raises UsageError."""
    found, operands = options.parse(argv, "B:d:fklnPp:r:T:vz:", ["discard", "resume"], USAGE)
    given = dict(found)
    verb = hold.parse_verb([name for name, _ in found], operands, USAGE)
    if verb:
        return verb
    if len(operands) != 1:
        raise UsageError("name one guest", USAGE)
    if "-k" in given and "-n" in given:
        raise UsageError("-k and -n exclude each other", USAGE)
    default = Limits()
    limits = Limits(
        downtime_ns=options.time_ns(given["-d"], "-d") if "-d" in given else default.downtime_ns,
        rounds=options.number(given["-r"], "-r", 0, 1000) if "-r" in given else default.rounds,
        time_ns=options.time_ns(given["-T"], "-T") if "-T" in given else default.time_ns,
        finish="-f" in given,
        rate_bytes=options.rate_bytes(given["-B"], "-B") if "-B" in given else None,
    )
    return Options(
        guest=operands[0],
        limits=limits,
        keep="-k" in given,
        dry_run="-n" in given,
        machine="-P" in given,
        verbose="-v" in given,
        command=given.get("-p"),
        level=options.number(given["-z"], "-z", 1, 19) if "-z" in given else None,
    )


class Move:
    """One guest, sent to standard output."""

    def __init__(self, opts: Options, console: Console, signals: Signals) -> None:
        """Nothing is opened yet."""
        self.opts = opts
        self.console = console
        self.signals = signals
        self.phase = Phase.RUNNING
        self.rounds: list[Round] = []
        self.keeper: Keeper | None = None
        self.hook: Hook | None = None
        self.writer: Writer | None = None
        self.predicted_ns = 0
        self.pause_ns = 0
        self.pause_start_ns = 0

    def run(self, base: Path, source: Source, lock: state.Lock) -> int:
        """Send the guest; return the exit status.  Raises BhyError.

        The caller owns source and lock, and calls recover() on any exception.
        """
        self.source = source
        self.records = state.Records(base, "source")
        self.head = source.head()
        self.progress = Progress(
            self.console,
            source.name,
            sum(segment.npages for segment in self.head.layout),
            verbose=self.opts.verbose,
            machine=self.opts.machine,
        )
        self.signals.on_report = self.progress.report
        with self.signals.interruptible():
            self.write_head(Feature.ZSTD if self.opts.level is not None else Feature(0))
        self.start_keeper(base, lock)
        with self.signals.interruptible():
            self.precopy()
        self.pause(base, lock)
        with self.signals.watching(self.done, _STALL_SECONDS):
            self.copy_last_pages()
        if self.opts.keep:
            self.release()
        with self.signals.watching(self.done, _STALL_SECONDS):
            self.write_state()
        with self.signals.interruptible():
            self.wait_for_hook()
        self.signals.on_deferred = self._too_late
        self.finish()
        return OK if self.opts.keep else HELD

    def write_head(self, features: Feature) -> None:
        """Write the header and all that cannot change while the guest runs."""
        form = Form.KEPT if self.opts.keep else Form.PLAIN
        self.stream_id = secrets.token_bytes(fmt.STREAM_ID_BYTES)
        header = Header(form, features, self.stream_id, secrets.randbits(64))
        self.writer = Writer(_STDOUT, header)
        write_head(self.writer, self.head)
        self.transfer = Transfer(
            self.source,
            self.head.layout,
            self.writer,
            level=self.opts.level,
            on_batch=self._on_batch,
        )
        self.console.log(f"guest {self.source.name}: stream {self.stream_id.hex()} begins")

    def precopy(self) -> None:
        """Send rounds while the guest runs, until the last set is small enough."""
        limits = self.opts.limits
        if limits.rounds == 0:
            return
        start_ns = time.monotonic_ns()
        while True:
            self.progress.round = len(self.rounds)
            self.rounds.append(self.transfer.round(rate_bytes=limits.rate_bytes))
            now_ns = time.monotonic_ns() - start_ns
            view = outlook(self.rounds, self.transfer.npages, limits)
            self.predicted_ns = view.copy_ns + view.scan_ns
            self.progress.predicted_ns = self.predicted_ns
            self._say_round(self.rounds[-1])
            decision = decide(self.rounds, self.transfer.npages, limits, now_ns)
            if decision == Decision.STOP:
                return
            if decision == Decision.GIVE_UP:
                raise DowntimeError(
                    f"guest {self.source.name}: after {len(self.rounds)} rounds and "
                    f"{duration(now_ns)} the last pages would still take "
                    f"{duration(view.copy_ns)}, more than -d {duration(limits.downtime_ns)}",
                    "it runs on here; allow more with -d, -r or -T, or pause it anyway with -f",
                )

    def start_keeper(self, base: Path, lock: state.Lock) -> None:
        """Start the keeper: long before the pause, or pages change while it starts."""
        self.record = state.Record(
            id=self.stream_id.hex(),
            guest=self.source.name,
            operand=self.opts.guest,
            lock=self.source.lock_name,
            phase=state.PAUSED,
            revive=dict(self.source.revive()),
        )
        self.keeper = Keeper(base, self.record, lock)

    def done(self) -> int:
        """Return a count that grows with what is read of the guest and what is written."""
        assert self.writer is not None
        return self.transfer.walked_pages + self.writer.offset_bytes

    def pause(self, base: Path, lock: state.Lock) -> None:
        """Record what is coming, pause, take the state."""
        name = self.source.name
        if self.keeper and not self.keeper.is_alive():
            self.start_keeper(base, lock)
        self.signals.ignore_stops()
        self.records.write(self.record.moved(state.PAUSED))
        self.phase = Phase.PAUSED
        if self.opts.command is not None:
            self.hook = Hook(self.opts.command, name, self.record.id)
        self.console.log(f"guest {name}: pausing, stream {self.record.id}")
        self.paused_at_ns = time.time_ns()
        self.pause_start_ns = time.monotonic_ns()
        self.source.pause()
        self.states = self.source.states()
        self.state_ns = time.monotonic_ns() - self.pause_start_ns
        self.progress.phase, self.progress.round = "paused, round", len(self.rounds)

    def copy_last_pages(self) -> None:
        """Send what changed since the last look; the guest is paused."""
        last = self.transfer.round(last=True)
        self.last_ns = last.end_ns - last.start_ns

    def release(self) -> None:
        """Resume a kept guest: its copy is complete."""
        with self.signals.interruptible():
            self.wait_for_hook()
        self._resume()
        self.phase = Phase.RELEASED
        self.pause_ns = time.monotonic_ns() - self.pause_start_ns

    def write_state(self) -> None:
        """Write the state sections and the time."""
        assert self.writer is not None
        for item in self.states:
            self.writer.state(item.name, item.data)
        paused_for_ns = time.monotonic_ns() - self.pause_start_ns
        if self.opts.keep:
            paused_for_ns = self.pause_ns
        self.writer.section(Type.TIME, fmt.TIME.pack(self.paused_at_ns, paused_for_ns))

    def wait_for_hook(self) -> None:
        """Wait until the -p command has ended well."""
        if self.hook:
            self.hook.wait()
            self.hook = None

    def finish(self) -> None:
        """Write END.  In the plain form the guest is held from here on."""
        assert self.writer is not None
        self.writer.sync()
        if self.opts.keep:
            self.writer.end()
            self.writer.sync()
        else:
            self.phase = Phase.HELD
            self.records.write(self.record.moved(state.HELD))
            self.writer.end()
            self.writer.sync()
            self.pause_ns = time.monotonic_ns() - self.pause_start_ns
            assert self.keeper is not None
            self.keeper.dismiss()
        self.signals.forget()
        self._say_end()

    def recover(self, error: BhyError) -> str:
        """Bring the guest back after a failure; return where it is, in words.

        The phase then says the same.  Raises GuestError if the guest cannot be
        resumed; the keeper, still there, goes on trying when we have ended.
        """
        name = self.source.name
        if self.phase == Phase.HELD and not (self.writer and self.writer.ended):
            # END is not whole, so the destination cannot start.  The record
            # says so for the keeper's sake; without it we resume all the same.
            with contextlib.suppress(BhyError):
                self.records.write(self.record.moved(state.PAUSED))
            self.phase = Phase.PAUSED
        if self.phase == Phase.HELD:
            return f"guest {name}: held here"
        if self.phase == Phase.PAUSED:
            try:
                self._resume()
            except BhyError as second:
                raise HeldError(
                    f"{error}; and the guest cannot be resumed: {second}",
                    f"guest {name}: its keeper goes on trying; see bhysend -l",
                ) from error
            self.phase = Phase.RUNNING
        elif self.keeper:
            self.keeper.dismiss()
        if self.hook:
            self.hook.kill()
        return f"guest {name}: it runs here"

    def _resume(self) -> None:
        self.source.resume()
        self.records.remove(self.record.id)
        if self.keeper:
            self.keeper.dismiss()

    def _on_batch(self, done_pages: int, sent_pages: int) -> None:
        assert self.writer is not None
        self.progress.done_pages = done_pages
        self.progress.sent_pages = sent_pages
        self.progress.sent_bytes = self.writer.offset_bytes
        self.progress.tick()

    def _too_late(self, name: str) -> None:
        self.console.say(f"{name}: too late, END is on its way; waiting until it is written")

    def _say_round(self, found: Round) -> None:
        if self.opts.verbose:
            self.console.say(
                f"guest {self.source.name}: round {len(self.rounds) - 1}: "
                f"{found.data_pages} pages, {found.zero_pages} zero, {size(found.sent_bytes)} "
                f"in {duration(found.end_ns - found.start_ns)}; "
                f"pause {duration(self.predicted_ns)} predicted"
            )

    def _say_end(self) -> None:
        assert self.writer is not None
        name = self.source.name
        what = "kept, it runs on here" if self.opts.keep else "held here"
        predicted = f", {duration(self.predicted_ns)} predicted" if self.rounds else ""
        text = (
            f"guest {name}: {what}; {self.writer.rounds} rounds, "
            f"{size(self.writer.offset_bytes)}; paused {duration(self.pause_ns)} "
            f"(state {duration(self.state_ns)}, last pages {duration(self.last_ns)}{predicted})"
        )
        self.console.say(text)
        self.console.log(text)
        if not self.opts.keep:
            self.console.say(f"when it runs at the destination: bhysend --discard {name}")
            self.console.say(f"when it surely does not: bhysend --resume {name}")


def send(opts: Options, console: Console) -> int:
    """Send one guest, or say what sending it would mean."""
    options.refuse_closed(_STDOUT, "standard output")
    if os.isatty(_STDOUT) and not opts.dry_run:
        raise UsageError("standard output is a terminal: a stream goes into a pipe or a file")
    signals = Signals()
    base = state.directory()
    hold.refuse_held(base, opts.guest)
    source = hypervisors.open_source(opts.guest)
    try:
        lock = state.Lock(base, source.lock_name, f"guest {source.name}")
        try:
            if opts.dry_run:
                from bhystream import dryrun

                with signals.interruptible():
                    return dryrun.run(source, opts.limits, console, machine=opts.machine)
            return move(opts, base, source, lock, console, signals)
        finally:
            lock.release()
    finally:
        source.close()


def move(
    opts: Options,
    base: Path,
    source: Source,
    lock: state.Lock,
    console: Console,
    signals: Signals,
) -> int:
    """Run a move; on a failure bring the guest back, and say where it is."""
    options.widen_pipe(_STDOUT)
    work = Move(opts, console, signals)
    try:
        return work.run(base, source, lock)
    except Exception as raised:
        # A signal that comes from here on finds the guest being brought back.
        signals.forget()
        error = as_error(raised)
        where = work.recover(error)
        if work.phase == Phase.HELD:
            console.fail(error)
            return HELD
        if work.writer:
            work.writer.abort(error.status, str(error))
        error.hint = f"{where}\n{error.hint}"
        raise error from raised


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhysend(8); return its exit status."""
    console = Console("bhysend")
    try:
        parsed = parse_options(sys.argv[1:] if argv is None else argv)
        if isinstance(parsed, hold.Verb):
            return hold.run(parsed, "source", console)
        return send(parsed, console)
    except Exception as raised:
        return console.fail(as_error(raised))
