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

from bhystream import hypervisors
from bhystream.backend.base import Sink
from bhystream.errors import AbortedError, BhyError, IncompatibleError, PipeError, TruncatedError
from bhystream.guest import Head
from bhystream.recv.receiving import Job, refuse, require_startable
from bhystream.stream.verify import Event, Go, Pages, Rehearsal
from bhystream.units import size

_DRY_HERE = "-n: a dry run here starts nothing, and this stream is none (bhysend -n)"


class Judge:
    """One stream, judged."""

    def __init__(self, job: Job) -> None:
        """Nothing is read yet but the header."""
        self._job = job
        self._answer = ""
        self._name = "?"
        self._reasons: list[str] = []
        self._sink: Sink | None = None
        self._is_understood = False
        self._is_begun = False
        self._has_go = False

    def run(self) -> None:
        """Read the stream to its end.  Returns where a start would be taken; raises BhyError."""
        reply = self._job.reply
        reply.hello()
        self._job.source.on_quiet = reply.hello if self._job.is_answered else None
        try:
            if self._job.is_answered:
                self._job.opts.refuse_answered()
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

    def _answer_head(self) -> None:
        reply = self._job.reply
        if self._reasons or not self._job.walk.is_dry_run:
            self._answer = "REFUSED"
            reply.say("REFUSED", f"guest {self._name}: {[*self._reasons, _DRY_HERE][0]}")
        else:
            self._answer = "ACCEPT"
            reply.say("ACCEPT")

    def _fail(self, error: BhyError) -> None:
        """Answer that the stream broke, as bhystream(5) has it: REFUSED before ACCEPT, else FAILED.

        One that was refused has its answer.
        """
        if self._answer != "REFUSED":
            self._job.reply.try_to_say("FAILED" if self._answer else "REFUSED", str(error))

    def _report(self) -> None:
        """Say what was found; raise IncompatibleError where it could not be started here."""
        what = "the head" if self._job.walk.is_dry_run else "the stream"
        told = f"guest {self._name}: {what} is sound"
        if not self._is_understood:
            told = f"guest {self._name}: {what} is whole; what it says of the guest is not checked"
        told += f" ({size(self._job.walk.reader.offset_bytes)})"
        if self._reasons:
            self._job.console.say(told)
            refuse(self._reasons, self._name)
        if self._job.is_answered and not self._job.walk.is_dry_run:
            why = "the source gave it up" if not self._has_go else "it is over"
            told += f"; it is of a move with answers, which starts nothing again: {why}"
        self._job.console.say(f"{told}; this host can take the guest")
