"""bhyrecv -n: say whether a stream could be started here, and start nothing.

There are two questions, and the answer to one says nothing about the other:

    is it sound?        the walk verifies every section, and a Contents those of the
                        hypervisor, for which this host need not have it
    can it be started?  a Sink decides, which changes nothing, and so do the
                        records of what was started here

So a stream of a hypervisor that this host lacks is verified like any other, and
refused at the end.  A stream is not called sound if its contents could not be
checked, because its hypervisor is not known here, or its CONFIG is on no list.

In the answered form the source gets the verdict as soon as the head is read.  If
the stream is a whole move, it is refused then, since -n starts nothing, and the
source may be waiting for a start.
"""

from __future__ import annotations

from collections.abc import Sequence

from bhystream import hypervisors
from bhystream.backend.base import Sink
from bhystream.errors import (
    AbortedError,
    BhyError,
    IncompatibleError,
    InputOutputError,
    TruncatedError,
)
from bhystream.guest import Head
from bhystream.recv.receiving import RecvJob, refuse, require_startable
from bhystream.stream.verify import Go, Item, Pages, Rehearsal
from bhystream.units import size

_DRY_HERE = "-n starts nothing, and this stream is a move, not a dry run (bhysend -n)"


class Judge:
    """One stream, judged."""

    def __init__(self, job: RecvJob) -> None:
        """Begin; only the header has been read."""
        self._job = job
        self._answer = ""
        self._name = "?"
        self._reasons: list[str] = []
        self._sink: Sink | None = None
        self._description: Sequence[str] = ()
        self._is_understood = False
        self._is_begun = False
        self._has_go = False

    def run(self) -> None:
        """Read the stream to its end.  Raises BhyError if it could not be started here."""
        reply = self._job.reply
        reply.hello()
        self._job.source.on_quiet = reply.hello if self._job.is_answered else None
        try:
            if self._job.is_answered:
                self._job.opts.refuse_answered()
            self._read()
        except (AbortedError, TruncatedError, InputOutputError) as error:
            # A refused source closes the stream: report the refusal.
            if self._answer == "REFUSED":
                refuse(self._reasons or [_DRY_HERE], self._name)
            self._fail(error)
            raise
        except BhyError as error:
            self._fail(error)
            raise
        self._report()

    def _read(self) -> None:
        events = self._job.walk.events()
        while True:
            with self._job.signals.interruptible():
                event = next(events, None)
            if event is None:
                break
            self._take(event)
            if self._answer != "REFUSED":
                self._job.seen(now=True)
        if not self._job.is_answered:
            with self._job.signals.interruptible():
                self._job.walk.expect_end_of_input()

    def _take(self, event: Item) -> None:
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
        self._job.source.on_quiet = None
        if self._job.is_answered:
            self._answer_head()

    def _find_sink(self, head: Head) -> None:
        what = self._job.opts.receiving(self._job.base, self._job.walk)
        self._sink, self._name, _ = hypervisors.open_sink(head.host["hypervisor"], self._name, what)

    def _understand(self, head: Head) -> None:
        contents = hypervisors.open_contents(head.host["hypervisor"])
        if contents:
            self._job.walk.understand(contents, head)
            self._is_understood = True

    def _check(self, head: Head) -> None:
        require_startable(self._job.opts, self._job.walk, self._job.records)
        if self._sink and self._is_understood:
            self._reasons += self._job.opts.reasons(self._sink, head)
            self._description = self._sink.description(head)

    def _answer_head(self) -> None:
        reply = self._job.reply
        if self._reasons or not self._job.walk.is_dry_run:
            self._answer = "REFUSED"
            reply.say("REFUSED", f"guest {self._name}: {[*self._reasons, _DRY_HERE][0]}")
        else:
            self._answer = "ACCEPT"
            reply.say("ACCEPT")

    def _fail(self, error: BhyError) -> None:
        """Answer that the stream broke, by bhystream(5): REFUSED before ACCEPT, else FAILED.

        A stream that was refused has its answer already.
        """
        if self._answer != "REFUSED":
            self._job.reply.try_to_say("FAILED" if self._answer else "REFUSED", str(error))

    def _report(self) -> None:
        """Say what was found; raise IncompatibleError if the stream could not be started here."""
        what = "the head" if self._job.walk.is_dry_run else "the stream"
        told = f"guest {self._name}: {what} is sound"
        if not self._is_understood:
            told = f"guest {self._name}: {what} is whole; what it says of the guest is not checked"
        told += f" ({size(self._job.walk.reader.offset_bytes)})"
        if self._reasons:
            self._job.console.say(told)
            self._describe()
            refuse(self._reasons, self._name)
        if self._job.is_answered and not self._job.walk.is_dry_run:
            why = "the source gave it up" if not self._has_go else "it is over"
            told += f"; it is a move in the answered form, which starts nothing again: {why}"
        self._job.console.say(f"{told}; this host can take the guest")
        self._describe()

    def _describe(self) -> None:
        """Show what lets this host's manager have the guest, if there is one."""
        if self._description:
            first, *lines = self._description
            self._job.console.say(f"guest {self._name}: {first}")
            self._job.console.show(lines)
