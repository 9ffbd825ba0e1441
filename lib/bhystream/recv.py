"""bhyrecv(8): options, the building of a guest, and its one error handler.

A guest is built from the events of verify.Walk, in the stream's order, and
nothing of it runs before END has been verified:

    header   may this stream be started here at all?
    head     the verdict, before any memory moves; then an empty guest is made
    pages    written into its memory, zeros punched out
    END      the device state is loaded; STARTED is recorded; it runs

Until the hypervisor is told to run it, every failure undoes what was made, and
the status (64 to 77) says that nothing was started here.  If it was told, and
what came of it is not known, the guest is left alone and the status is 81.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhystream import format as fmt
from bhystream import hold, hypervisors, options, state
from bhystream.backend.base import PAGE_BYTES, Destination, Head, Segment, Sink
from bhystream.errors import (
    OK,
    BhyError,
    IncompatibleError,
    InDoubtError,
    UsageError,
    as_error,
    from_oserror,
)
from bhystream.format import Form, RoundEnd
from bhystream.hole import punch
from bhystream.page import scatter
from bhystream.report import Console, Progress, duration, size
from bhystream.signals import Signals
from bhystream.verify import Ended, Pages, Walk

USAGE = """\
usage: bhyrecv [-fnPuv] [--again] [-o key=value]... [guest]
       bhyrecv -l [guest]
       bhyrecv --discard guest | --resume guest"""

_STDIN = 0


@dataclass
class Options:
    """The command line, parsed."""

    guest: str | None = None
    force: bool = False
    dry_run: bool = False
    machine: bool = False
    unstarted: bool = False
    verbose: bool = False
    again: bool = False
    resources: dict[str, str] = field(default_factory=dict)


def parse_options(argv: Sequence[str]) -> Options | hold.Verb:
    """Parse the command line.  Raises UsageError."""
    found, operands = options.parse(argv, "flno:Puv", ["again", "discard", "resume"], USAGE)
    names = [name for name, _ in found]
    verb = hold.parse_verb(names, operands, USAGE)
    if verb:
        return verb
    if len(operands) > 1:
        raise UsageError("name at most one guest", USAGE)
    opts = Options(
        guest=operands[0] if operands else None,
        force="-f" in names,
        dry_run="-n" in names,
        machine="-P" in names,
        unstarted="-u" in names,
        verbose="-v" in names,
        again="--again" in names,
    )
    for name, value in found:
        if name == "-o":
            key, equals, text = value.partition("=")
            if not equals or key in opts.resources:
                raise UsageError(f"-o {value}: not a key=value, or given twice", USAGE)
            opts.resources[key] = text
    return opts


class Build:
    """One guest, rebuilt from standard input."""

    def __init__(
        self, opts: Options, walk: Walk, base: Path, console: Console, signals: Signals
    ) -> None:
        """walk: at the beginning of its events."""
        self.opts = opts
        self.walk = walk
        self.base = base
        self.console = console
        self.signals = signals
        self.layout: Sequence[Segment] = ()
        self.records = state.Records(base, "destination")
        self.id = walk.header.stream_id.hex()
        self.sink: Sink | None = None
        self.lock: state.Lock | None = None
        self.stream_lock: state.Lock | None = None
        self.destinations: Sequence[Destination] = ()
        self.starts: list[int] = []
        self.name = ""
        self.operand = ""
        self.recorded = False
        self.let_go = False

    def run(self) -> None:
        """Build and start the guest.  Raises BhyError; then call undo()."""
        # Held to the end: a second bhyrecv of the same stream is refused now,
        # and finds the record later.
        self.stream_lock = state.Lock(self.base, f"stream-{self.id}", f"stream {self.id}")
        self.check_form()
        events = self.walk.events()
        while True:
            # Reading may be interrupted; acting on what was read may not.
            with self.signals.interruptible():
                event = next(events, None)
            match event:
                case None:
                    return
                case Head():
                    self.prepare(event)
                case Pages():
                    self.write_pages(event)
                case RoundEnd():
                    self.say_round(event)
                case Ended():
                    self.ended_ns = time.monotonic_ns()
                    self.finish(event)
                    return

    def check_form(self) -> None:
        """Refuse what may not be started, before anything is made."""
        if self.walk.is_dry_run:
            raise UsageError("the stream is a dry run (bhysend -n): read it with bhyrecv -n")
        if self.walk.header.form == Form.ANSWERED:
            raise IncompatibleError("the stream is of the answered form, which needs a way back")
        record = self.records.get(self.id)
        if record and record.phase == state.LOADED and hold.is_alive(record):
            raise IncompatibleError(
                f"stream {self.id} stands loaded on this host, as {record.operand}",
                f"bhyrecv --resume {self.id}, or bhyrecv --discard {self.id}",
            )
        if record and not self.opts.again:
            raise IncompatibleError(
                f"stream {self.id} was {record.phase} on this host before, as {record.operand}",
                "if no copy of that guest runs anywhere: --again",
            )

    def prepare(self, head: Head) -> None:
        """Give the verdict, and make the empty guest."""
        self.sink, self.name, self.operand = hypervisors.open_sink(
            head.host["hypervisor"],
            self.opts.guest,
            head.config["name"],
            self.opts.resources,
            self.base,
            force=self.opts.force,
        )
        self.lock = state.Lock(self.base, f"to-{self.operand}", f"guest {self.name}")
        refuse(self.sink.check(head), self.name)
        self.console.log(f"guest {self.name}: stream {self.id} begins")
        self.layout = head.layout
        page = 0
        for segment in head.layout:
            self.starts.append(page)
            page += segment.npages
        self.progress = Progress(
            self.console, self.name, page, verbose=self.opts.verbose, machine=self.opts.machine
        )
        self.signals.on_report = self.progress.report
        self.destinations = self.sink.open()

    def write_pages(self, event: Pages) -> None:
        """Put pages where they belong, and holes where they are zero."""
        to = self.destinations[event.segment]
        base = self.starts[event.segment]
        npages = self.layout[event.segment].npages
        try:
            scatter(to.fd, to.offset_bytes, base, npages, event.extents, event.pages)
            for first, count, kind in fmt.EXTENT.iter_unpack(event.extents):
                if kind == fmt.KIND_ZERO:
                    start = to.offset_bytes + (first - base) * PAGE_BYTES
                    punch(to.fd, start, count * PAGE_BYTES)
        except OSError as error:
            raise from_oserror(error, f"write the memory of guest {self.name}") from error
        self.report_pages(event)

    def report_pages(self, event: Pages) -> None:
        """Show progress: how far this round has come, and what it brought."""
        first, count, _ = fmt.EXTENT.unpack_from(
            event.extents, len(event.extents) - fmt.EXTENT.size
        )
        self.progress.done_pages = first + count
        self.progress.sent_pages += len(event.pages) // PAGE_BYTES
        self.progress.sent_bytes = self.walk.reader.offset_bytes
        self.progress.tick()

    def say_round(self, event: RoundEnd) -> None:
        """Report a round, with -v."""
        self.progress.round = event.round + 1
        self.progress.sent_pages = 0
        if self.opts.verbose:
            self.console.say(
                f"guest {self.name}: round {event.round}: {event.data_pages} pages, "
                f"{event.zero_pages} zero"
            )

    def finish(self, event: Ended) -> None:
        """Load the state; record the start; start.  The stream has verified."""
        assert self.sink is not None and self.lock is not None
        self.sink.load(event.states)
        record = state.Record(
            id=self.id,
            guest=self.name,
            operand=self.operand,
            lock=f"to-{self.operand}",
            phase=state.LOADED if self.opts.unstarted else state.STARTED,
            revive=dict(self.sink.revive()),
        ).moved(state.LOADED if self.opts.unstarted else state.STARTED)
        self.records.write(record)
        self.recorded = True
        if self.opts.unstarted:
            self.sink.leave_paused()
        else:
            self.sink.start()
        self.let_go = True
        self.say_end(event)

    def say_end(self, event: Ended) -> None:
        """Say where the guest is now, and how long it stood still."""
        what = "loaded, paused" if self.opts.unstarted else "it runs here"
        text = (
            f"guest {self.name}: {what}; {event.end.rounds} rounds, "
            f"{size(self.walk.reader.offset_bytes)}"
        )
        here_ns = time.monotonic_ns() - self.ended_ns
        if event.time and event.time.paused_for_ns and self.walk.header.form == Form.PLAIN:
            total = event.time.paused_for_ns + here_ns
            text += f"; paused {duration(total)} and the way of END, {duration(here_ns)} of it here"
        self.console.say(text)
        self.console.log(text)
        if self.opts.unstarted:
            self.console.say(f"let it run: bhyrecv --resume {self.name}")
            self.console.say(f"or end it: bhyrecv --discard {self.name}")

    def undo(self, error: BhyError) -> BhyError:
        """Leave the host as it was found, and say so with the error.

        A guest that may have run is left alone, and its record with it: only
        the operator can see whether it runs, and ending it could end the only
        copy that has gone on.  Returns the error to raise.
        """
        if self.sink and self.sink.may_have_run:
            return InDoubtError(
                f"guest {self.name}: it may run here: {error}",
                f"look at {self.operand}; until you know, keep the source held",
            )
        if self.sink:
            self.sink.abort()
        if self.recorded:
            self.records.remove(self.id)
        error.hint = f"nothing was started here\n{error.hint}"
        return error

    def close(self) -> None:
        """Give up the locks."""
        for lock in (self.lock, self.stream_lock):
            if lock:
                lock.release()


def refuse(reasons: Sequence[str], name: str) -> None:
    """Raise IncompatibleError if there are reasons against the guest."""
    if reasons:
        raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))


def verdict(opts: Options, walk: Walk, base: Path, console: Console, signals: Signals) -> None:
    """Verify a stream to its end and say whether this host could take it (-n)."""
    reasons: list[str] = []
    name = "?"
    events = walk.events()
    while True:
        with signals.interruptible():
            event = next(events, None)
        if event is None:
            break
        if isinstance(event, Head):
            sink, name, _ = hypervisors.open_sink(
                event.host["hypervisor"],
                opts.guest,
                event.config["name"],
                opts.resources,
                base,
                force=opts.force,
            )
            reasons = sink.check(event)
    if walk.header.form != Form.ANSWERED:
        with signals.interruptible():
            walk.expect_end_of_input()
    refuse(reasons, name)
    what = "the head" if walk.is_dry_run else "the stream"
    console.say(
        f"guest {name}: {what} is sound ({size(walk.reader.offset_bytes)}); "
        "this host can take the guest"
    )


def receive(opts: Options, console: Console) -> int:
    """Read a stream from standard input."""
    options.refuse_closed(_STDIN, "standard input")
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: a stream comes from a pipe or a file")
    signals = Signals()
    options.widen_pipe(_STDIN)
    base = state.directory()
    try:
        with signals.interruptible():
            walk = Walk(io.FileIO(_STDIN, closefd=False))
    except BhyError as early:
        early.hint = "nothing was started here"
        raise
    if opts.dry_run:
        verdict(opts, walk, base, console, signals)
        return OK
    build = Build(opts, walk, base, console, signals)
    try:
        build.run()
    except Exception as raised:
        signals.forget()
        error = as_error(raised)
        if build.let_go:
            # The guest is where it was wanted; what failed came after that.
            console.fail(error)
            return OK
        raise build.undo(error) from raised
    finally:
        build.close()
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhyrecv(8); return its exit status."""
    console = Console("bhyrecv", show_host=True)
    try:
        parsed = parse_options(sys.argv[1:] if argv is None else argv)
        if isinstance(parsed, hold.Verb):
            return hold.run(parsed, "destination", console)
        return receive(parsed, console)
    except Exception as raised:
        return console.fail(as_error(raised))
