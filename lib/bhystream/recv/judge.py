"""bhyrecv -n: what a start of this stream would come to, without one.

Two things are said, and one does not stand for the other:

    is it sound?        the walk verifies every section, and the hypervisor's own
                        by its Contents, which need no such hypervisor here
    can it be started?  the verdict of a Sink, which touches nothing, and of the
                        records of what was started here

So a stream of a hypervisor that this host lacks is verified as any other, and
refused in the end.  It is not called sound where its contents could not be
checked: of a hypervisor that nobody knows here, and of a CONFIG that is on no list.

In the answered form the source hears the verdict as soon as the head is read.  A
whole stream is refused then, since nothing is started: its source may be there.
"""

from __future__ import annotations

from pathlib import Path

from bhystream import hypervisors
from bhystream.backend.base import Sink
from bhystream.errors import AbortedError, BhyError, IncompatibleError, PipeError, TruncatedError
from bhystream.guest import Head
from bhystream.handover import state
from bhystream.recv.build import refuse, require_startable
from bhystream.recv.options import Options
from bhystream.recv.reply import Reply, TimedInput
from bhystream.report import Console
from bhystream.signals import Signals
from bhystream.stream.format import Form
from bhystream.stream.verify import Event, Go, Pages, Rehearsal, Walk
from bhystream.units import size

_DRY_HERE = "-n: a dry run here starts nothing, and this stream is none (bhysend -n)"


class Judge:
    """One stream, judged."""

    def __init__(
        self,
        opts: Options,
        walk: Walk,
        source: TimedInput,
        base: Path,
        console: Console,
        signals: Signals,
    ) -> None:
        """walk: at the beginning of its events, which come from source."""
        self._opts = opts
        self._walk = walk
        self._source = source
        self._base = base
        self._console = console
        self._signals = signals
        self._is_answered = walk.header.form == Form.ANSWERED
        self._reply = Reply(base, walk.header.stream_id.hex()) if self._is_answered else None
        self._answer = ""
        self._name = "?"
        self._reasons: list[str] = []
        self._sink: Sink | None = None
        self._is_understood = False
        self._is_begun = False
        self._has_go = False

    def run(self) -> None:
        """Read the stream to its end.  Returns where a start would be taken; raises BhyError."""
        if self._reply:
            self._reply.hello()
            self._source.on_quiet = self._reply.hello
        try:
            if self._is_answered:
                self._opts.refuse_answered()
            self._read()
        except (AbortedError, TruncatedError, PipeError) as error:
            # A source that was refused goes away.
            if self._answer == "REFUSED":
                refuse(self._reasons or [_DRY_HERE], self._name)
            self._fail(error)
            raise
        except BhyError as error:
            self._fail(error)
            raise
        self._report()

    def _read(self) -> None:
        events = self._walk.events()
        while True:
            with self._signals.interruptible():
                event = next(events, None)
            if event is None:
                break
            self._take(event)
            if self._reply and self._answer != "REFUSED":
                reader = self._walk.reader
                self._reply.seen(reader.sequence - 1, reader.offset_bytes, now=True)
        if not self._is_answered:
            with self._signals.interruptible():
                self._walk.expect_end_of_input()

    def _take(self, event: Event) -> None:
        match event:
            case Head():
                self._take_head(event)
            case Rehearsal():
                self._is_begun = True
            case Pages() if not self._is_begun:
                self._is_begun = True
                if self._sink and not self._reasons:
                    self._reasons = self._sink.late_reasons()
            case Go():
                self._has_go = True

    def _take_head(self, head: Head) -> None:
        self._name = head.config["name"]
        for step in (self._find_sink, self._understand, self._check):
            try:
                step(head)
            except IncompatibleError as error:
                text = str(error).removeprefix(f"guest {self._name}: ")
                self._reasons += [text, *error.hint.splitlines()]
        self._source.on_quiet = None
        if self._reply:
            self._answer_head(self._reply)

    def _find_sink(self, head: Head) -> None:
        what = self._opts.receiving(self._base, self._walk)
        self._sink, self._name, _ = hypervisors.open_sink(head.host["hypervisor"], self._name, what)

    def _understand(self, head: Head) -> None:
        contents = hypervisors.open_contents(head.host["hypervisor"])
        if contents:
            self._walk.understand(contents, head)
            self._is_understood = True

    def _check(self, head: Head) -> None:
        require_startable(self._opts, self._walk, state.Records(self._base, "destination"))
        if self._sink and self._is_understood:
            self._reasons += self._opts.reasons(self._sink, head)

    def _answer_head(self, reply: Reply) -> None:
        if self._reasons or not self._walk.is_dry_run:
            self._answer = "REFUSED"
            reply.say("REFUSED", f"guest {self._name}: {[*self._reasons, _DRY_HERE][0]}")
        else:
            self._answer = "ACCEPT"
            reply.say("ACCEPT")

    def _fail(self, error: BhyError) -> None:
        """Answer that the stream broke, as bhystream(5) has it: REFUSED before ACCEPT, else FAILED.

        One that was refused has its answer.
        """
        if self._reply and self._answer != "REFUSED":
            self._reply.try_to_say("FAILED" if self._answer else "REFUSED", str(error))

    def _report(self) -> None:
        """Say what was found; raise IncompatibleError where it could not be started here."""
        what = "the head" if self._walk.is_dry_run else "the stream"
        told = f"guest {self._name}: {what} is sound"
        if not self._is_understood:
            told = f"guest {self._name}: {what} is whole; what it says of the guest is not checked"
        told += f" ({size(self._walk.reader.offset_bytes)})"
        if self._reasons:
            self._console.say(told)
            refuse(self._reasons, self._name)
        if self._is_answered and not self._walk.is_dry_run:
            why = "the source gave it up" if not self._has_go else "it is over"
            told += f"; it is of a move with answers, which starts nothing again: {why}"
        self._console.say(f"{told}; this host can take the guest")
