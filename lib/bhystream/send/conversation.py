"""The answered forms at the source: bhysend writes a stream, and waits for the answers to it.

    -a        the stream goes to standard output; the answers come through `bhysend -A`
    command   bhysend runs the command: the stream goes to the command's standard
              input, and the answers come from the command's standard output

A Route is the way there and the way back, from before the first byte until the
third stage has its status.  A Conversation is the exchange on a Route, from the
head on.  handshake.py defines what the answers mean; this file defines how bhysend
waits for them, and for how long.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream.errors import (
    EXIT_IN_DOUBT,
    EXIT_OK,
    BhyError,
    GuestError,
    InputOutputError,
    Interrupted,
    ReaderGoneError,
    as_error,
    ending,
)
from bhystream.guest import SLOW_BYTES_PER_SECOND
from bhystream.handover.answers import Answer, Inbox, LostError
from bhystream.handover.handshake import ACCEPT_SECONDS, ANSWER_SECONDS, READY_SECONDS, Event
from bhystream.handover.recorded import EVENTS
from bhystream.report import Console
from bhystream.send.command import Command
from bhystream.send.flush import Flush
from bhystream.send.options import AS_IT_IS
from bhystream.send.rendezvous import Rendezvous
from bhystream.signals import Signals
from bhystream.stream.writer import Writer

_STDOUT = 1
_SAY_SECONDS = 10
_HELLO_STALL_S = 60.0
_LAST_WORDS_S = 5.0
_END_SECONDS = 10.0
_SHORT_SECONDS = 0.5


@dataclass(frozen=True)
class Ready:
    """A destination that waits for GO: its HELLO, and the nonce of its READY."""

    hello: Answer
    nonce: bytes


class Route:
    """The way of one stream to its destination, and the way back.

    stream_fd: the descriptor that the stream goes to.  inbox: the answers so far.
    The caller owns the Route, and must close() it, with the status for the third stage.
    """

    def __init__(
        self,
        console: Console,
        signals: Signals,
        base: Path,
        names: tuple[str, str],
        id_: str,
        command: Sequence[str] = (),
        umask: int = AS_IT_IS,
    ) -> None:
        """Open both ways; on any failure close() what was opened, and end the command.

        base: the state directory.  names: the guest's name, and its operand.  id_:
        of the stream.  command: the words of the command form, empty for -a.  umask:
        for the command.  Raises GuestError if the command cannot be run; UsageError,
        InputOutputError or AccessError if bhysend cannot listen for third stages.
        """
        self._console = console
        self._signals = signals
        self.who = f"guest {names[0]}"
        self.inbox = Inbox()
        self._rendezvous = Rendezvous(self.inbox, id_, names, self._noise)
        self._command: Command | None = None
        self.stream_fd = _STDOUT
        self._is_closed = False
        self._is_explained = False
        self._is_hurried = False
        try:
            if command:
                self._command = Command(command, umask)
                self.stream_fd = self._command.stream_fd
                self._rendezvous.read(self._command.answer_fd)
            self._rendezvous.listen(base)
        except BaseException as raised:
            self.close(as_error(raised).status if isinstance(raised, Exception) else EXIT_OK)
            raise

    def start(self) -> None:
        """Start the thread that takes answers.  No Command may be started after that."""
        self._rendezvous.start()

    @property
    def thread_id(self) -> int | None:
        """Return the native id of the thread that takes answers, None before start()."""
        return self._rendezvous.thread_id

    @property
    def answer_fd(self) -> int:
        """Return the descriptor of a command's answers, -1 for -a.  The keeper inherits it."""
        return self._command.answer_fd if self._command else -1

    @property
    def host(self) -> str:
        """Return the destination's name from HELLO, "the destination" before HELLO."""
        return self.inbox.hello.host if self.inbox.hello else "the destination"

    def hint(self) -> str:
        """Return what may be missing in the pipeline if no answer comes, "" if not known."""
        if self.inbox.hello is not None or self._command:
            return ""
        return "; is there a `| bhysend -A` at the end?"

    def explain(self, error: BhyError) -> BhyError:
        """Return the reason why the stream or the way back broke, if one is known, else `error`.

        The reason is the destination's last answer, or else the command's status, each
        awaited for _LAST_WORDS_S.  What bhysend itself has found needs no explanation.  A
        command that still lives gives none: it will end only because bhysend ends its input.
        A signal ends the wait.
        """
        # The operator who gives up waits for nobody.
        self._is_hurried = isinstance(error, Interrupted)
        if not isinstance(error, ReaderGoneError | LostError):
            return error
        with contextlib.suppress(Interrupted), self._signals.interruptible():
            return self._explained(error)
        self._is_hurried = True
        return error

    def _explained(self, error: BhyError) -> BhyError:
        if self.inbox.hello is not None:
            self.inbox.wait(lambda: False, _LAST_WORDS_S)
        if self.inbox.final is not None:
            return self.inbox.failure() or error
        status = self._command.ends_within(_LAST_WORDS_S) if self._command else None
        if self._command and status is not None:
            self._is_explained = True
            return GuestError(f"{self._command.words}: it {ending(status)}")
        return error

    def close(self, status: int) -> None:
        """Tell third stages the status, and end the command.  May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._rendezvous.close(status)
        self.inbox.close()
        if self._command:
            # A command may not see EOF: before HELLO it may be asking for a password,
            # and in doubt its link may be dead.  Then kill it soon.
            hurry = self.inbox.hello is None or status == EXIT_IN_DOUBT or self._is_hurried
            ended = self._end(self._command, hurry=hurry)
            if ended and not self._is_explained and self.inbox.final is None:
                self._console.say(f"{self._command.words}: it {ending(ended)}")

    def _end(self, command: Command, *, hurry: bool) -> int | None:
        """End the command; return its status, or None if it was killed.  A signal kills it."""
        if hurry:
            self._signals.forget()  # half a second is soon enough
        try:
            with self._signals.interruptible():
                return command.end(_SHORT_SECONDS if hurry else _END_SECONDS)
        except Interrupted:
            self._signals.put_back()  # it was meant for more than for this wait
        command.kill()
        return None

    def _noise(self, line: bytes) -> None:
        """Show a line that a login shell has said before the first answer."""
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))


class Conversation:
    """The exchange with one destination: what bhysend waits for, and for how long."""

    def __init__(self, route: Route, writer: Writer, console: Console, signals: Signals) -> None:
        """Begin after the head is written.  route and writer stay the caller's."""
        self.route = route
        self._inbox = route.inbox
        self._console = console
        self._signals = signals
        self._flush = Flush(writer, route.inbox)
        self._deadline = 0.0

    @property
    def host(self) -> str:
        """Return the destination's name, as Route.host has it."""
        return self.route.host

    @property
    def trip_ns(self) -> int:
        """Return how long the last push took, there and back, in ns."""
        return self._flush.trip_ns

    def check(self) -> None:
        """Raise the error that ends the conversation before GO, if one has come.

        Raises IncompatibleError for a refusal, else GuestError.
        """
        self._inbox.check()

    def await_accept(self) -> None:
        """Wait until the destination has read the head and accepted it.

        HELLO has no time limit while writes block, because an operator may be typing
        a password.  Raises IncompatibleError if the destination refuses the guest,
        GuestError if it fails or is late, UsageError if the pipeline holds the stream
        back until EOF, and InputOutputError if the stream cannot be written.
        """
        self.route.start()
        with self._saying("waiting for the destination", self.route.hint):
            self._flush.until(lambda: self._inbox.hello is not None, _HELLO_STALL_S)
            # The PAD until HELLO shows how long the destination took to start, and not
            # how much the pipeline holds back, so forget it.
            self._flush.held_bytes = 0
            self._flush.through()
            self._await(lambda: self._inbox.accepted, ACCEPT_SECONDS, "ACCEPT")

    def settle(self) -> int:
        """Wait until the destination has read all that was written; return the link's time in ns.

        The call measures how much the pipeline holds back, and then trip_ns, the time
        there and back with so much PAD.  If the amount has grown, the call measures it
        again from nothing, and keeps the smaller one, because the link may only have
        hesitated.  The time in which a filter held the bytes and nothing moved is not the
        link's.  Raises what await_accept() raises.
        """
        start_ns, idle_ns = time.monotonic_ns(), self._flush.idle_ns
        before = self._flush.held_bytes
        self._flush.through()
        found = self._flush.held_bytes
        if found > before:
            self._flush.held_bytes = 0
            self._flush.through()
            self._flush.held_bytes = min(found, self._flush.held_bytes)
            self._flush.through()
        return time.monotonic_ns() - start_ns - (self._flush.idle_ns - idle_ns)

    def refuse_early_ready(self) -> None:
        """Raise GuestError if READY has come before END is written."""
        if self._inbox.nonce is not None:
            raise GuestError(f"{self.host}: READY came before END")

    def await_ready(self, memory_bytes: int) -> Ready:
        """Wait for READY, after END; return the destination that has said READY.

        memory_bytes: the guest's memory size.  A destination that could not start
        early loads that memory now, so the limit grows with it.  Raises what
        await_accept() raises.
        """
        limit_s = READY_SECONDS + memory_bytes // SLOW_BYTES_PER_SECOND
        with self._saying(f"waiting until {self.host} is ready", limit_s=limit_s):
            self._flush.through()
            self._await(lambda: self._inbox.nonce is not None, limit_s, "READY")
        # The destination may have failed since READY.
        self._inbox.check()
        if self._inbox.nonce is None or self._inbox.hello is None:
            raise GuestError(f"{self.host}: READY came without HELLO")
        return Ready(self._inbox.hello, self._inbox.nonce)

    def commit(self) -> None:
        """Start the time limit of the answer to GO; from here on say that a signal is too late.

        Called just before bhysend records and writes GO: from then on only the answer counts.
        """
        self._deadline = time.monotonic() + ANSWER_SECONDS
        self._signals.on_deferred = lambda name: self._console.say(
            f"{name}: too late, GO is out; waiting for the answer of {self.host}, "
            f"{max(self._deadline - time.monotonic(), 0):.0f} s at the most"
        )

    def await_outcome(self) -> tuple[Event, str]:
        """Wait for the answer to GO; return its event, and the reason for FAILED and DOUBT.

        Called after commit().  Raises no BhyError: GO is out, and only the answer counts.
        """
        with (
            contextlib.suppress(BhyError),
            self._saying(f"waiting for the answer of {self.host}", limit_s=ANSWER_SECONDS),
        ):
            # Wait on even if the push fails: when bhyrecv has ended, the way there is
            # gone, but the way back may still bring bhyrecv's answer.
            with contextlib.suppress(BhyError):
                self._flush.until(lambda: self._inbox.final is not None)
            self._inbox.wait(
                lambda: self._inbox.final is not None, self._deadline - time.monotonic()
            )
        final = self._inbox.final
        if final is not None and final.word in EVENTS:
            return EVENTS[final.word], final.text
        if final is not None:
            return Event.DOUBT, f"{self.host} cannot say whether the guest ran there"
        return Event.DOUBT, self._inbox.lost or f"no answer came for {ANSWER_SECONDS} s"

    def _await(self, condition: Callable[[], bool], seconds: int, word: str) -> None:
        if not self._inbox.wait(condition, seconds):
            self._inbox.check()
            raise GuestError(f"{self.host}: no {word} came for {seconds} s")

    @contextlib.contextmanager
    def _saying(
        self, what: str, hint: Callable[[], str] = lambda: "", limit_s: float = math.inf
    ) -> Iterator[None]:
        """Print every 10 s what bhysend waits for.

        Raises InputOutputError, also out of a blocked write(2), at the first of these
        times that is later than limit_s.
        """
        start = time.monotonic()

        def say() -> None:
            seconds = time.monotonic() - start
            if seconds > limit_s:
                raise InputOutputError(f"{what}: given up after {seconds:.0f} s")
            self._console.say(f"{self.route.who}: {what}, for {seconds:.0f} s now{hint()}")

        with self._signals.ticking(say, _SAY_SECONDS):
            yield
