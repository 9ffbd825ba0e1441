"""The answered forms at the source: a stream goes out, and its answers are waited for.

    -a        stream on standard output; answers through `bhysend -A`
    command   bhysend runs it: stream on its standard input, answers from its
              standard output

A Route is both ways, from before the first byte to the status of the third
stage.  A Conversation is what is said on it, from the head on.  handshake.py
says what the answers mean; here is how they are waited for, and how long.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from bhystream.errors import (
    IN_DOUBT,
    OK,
    BhyError,
    GuestError,
    PipeError,
    ReaderGoneError,
    as_error,
    ending,
)
from bhystream.guest import SLOW_BYTES_PER_SECOND
from bhystream.handover.answers import Answer, Box, LostError
from bhystream.handover.handshake import ACCEPT_SECONDS, ANSWER_SECONDS, READY_SECONDS, Event
from bhystream.handover.standing import EVENTS
from bhystream.report import Console
from bhystream.send.options import AS_IT_IS
from bhystream.send.push import Push
from bhystream.send.rendezvous import Rendezvous
from bhystream.signals import Signals
from bhystream.stream.writer import Writer

_STDOUT = 1
_SAY_SECONDS = 10
_HELLO_STALL_S = 60.0
_LAST_WORDS_S = 5.0
_END_SECONDS = 10.0
_SHORT_SECONDS = 0.5
# A Ctrl-C or a closed terminal must not cut the way back at the worst moment;
# what is to end, we end, by closing its standard input.
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP)


class Command:
    """The command of the command form, a child of ours."""

    def __init__(self, argv: Sequence[str], umask: int = AS_IT_IS) -> None:
        """Start it.  umask: the operator's.  Raises GuestError.

        No thread may have been started yet.
        """
        self.words = shlex.join(argv)
        try:
            with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
                stdin, self._stream = _pipe(theirs, ours)
                self._answers, stdout = _pipe(ours, theirs)
                self._process = subprocess.Popen(
                    argv, stdin=stdin, stdout=stdout, preexec_fn=_ignore, umask=umask
                )
                ours.pop_all()
        except OSError as error:
            raise GuestError(f"cannot run {argv[0]}: {error.strerror}") from error
        self.stream_fd = self._stream.fileno()
        self.answer_fd = self._answers.fileno()

    def hang_up(self) -> None:
        """Close its standard input: it gets EOF.  Twice is no error."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def ends_within(self, seconds: float) -> int | None:
        """Return its status if it ends by itself; None while it goes on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self, seconds: float) -> int | None:
        """Wait for its end, then kill it; return its status, None if it was killed."""
        self.hang_up()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """Return both ends of a pipe, each closed with its stack.  Raises OSError."""
    read_fd, write_fd = os.pipe()
    return (
        reading.enter_context(FileIO(read_fd, "r")),
        writing.enter_context(FileIO(write_fd, "w")),
    )


def _ignore() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Ready:
    """A destination that waits for GO: its HELLO, and the nonce of its READY."""

    hello: Answer
    nonce: bytes


class Route:
    """The way of one stream to its destination, and the way back.

    stream_fd: where the stream goes.  box: what has come back.  Owned by who
    opens it; close() ends it, with the status for the third stage.
    """

    def __init__(
        self,
        console: Console,
        base: Path,
        names: tuple[str, str],
        id_: str,
        command: Sequence[str] = (),
        umask: int = AS_IT_IS,
    ) -> None:
        """Open both ways; on any failure nothing is left.

        base: the state directory.  names: the guest's, and its operand.  id_:
        of the stream.  command: of the command form, empty for -a; umask: for
        it.  Raises GuestError, UsageError, PipeError, AccessError.
        """
        self._console = console
        self.who = f"guest {names[0]}"
        self.box = Box()
        self._rendezvous = Rendezvous(self.box, id_, names, self._noise)
        self._command: Command | None = None
        self.stream_fd = _STDOUT
        self._is_closed = False
        self._is_explained = False
        try:
            if command:
                self._command = Command(command, umask)
                self.stream_fd = self._command.stream_fd
                self._rendezvous.read(self._command.answer_fd)
            self._rendezvous.listen(base)
        except BaseException as raised:
            self.close(as_error(raised).status if isinstance(raised, Exception) else OK)
            raise

    def start(self) -> None:
        """Begin to take answers, in a thread: no process is started after that."""
        self._rendezvous.start()

    @property
    def answer_fd(self) -> int:
        """Return where a command's answers come from, -1 for -a: the keeper gets it too."""
        return self._command.answer_fd if self._command else -1

    @property
    def host(self) -> str:
        """Return the destination as it calls itself."""
        return self.box.hello.host if self.box.hello else "the destination"

    def hint(self) -> str:
        """Return what may be missing where nobody answers, "" where that is not known."""
        if self.box.hello is not None or self._command:
            return ""
        return "; is there a `| bhysend -A` at the end?"

    def explain(self, error: BhyError) -> BhyError:
        """Return why the stream or the way back broke, if anybody says it; else the error.

        What we have found ourselves is its own explanation, and so is what
        broke while the command lives: its end is only what we make of it.
        """
        if not isinstance(error, ReaderGoneError | LostError):
            return error
        if self.box.hello is not None:
            self.box.wait(lambda: False, _LAST_WORDS_S)
        if self.box.final is not None:
            return self.box.failure() or error
        status = self._command.ends_within(_LAST_WORDS_S) if self._command else None
        if self._command and status is not None:
            self._is_explained = True
            return GuestError(f"{self._command.words}: it {ending(status)}")
        return error

    def close(self, status: int) -> None:
        """End the conversation.  Twice is no error."""
        if self._is_closed:
            return
        self._is_closed = True
        self._rendezvous.close(status)
        self.box.close()
        if self._command:
            # One that waits for a password does not hear that its input ends.
            hurry = self.box.hello is None or status == IN_DOUBT
            ended = self._command.end(_SHORT_SECONDS if hurry else _END_SECONDS)
            if ended and not self._is_explained and self.box.final is None:
                self._console.say(f"{self._command.words}: it {ending(ended)}")

    def _noise(self, line: bytes) -> None:
        """Show what a login shell said before the first answer."""
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))


class Conversation:
    """What bhysend says to one destination, and waits to hear."""

    def __init__(self, route: Route, writer: Writer, console: Console, signals: Signals) -> None:
        """route, writer: stay the caller's; the head is written."""
        self.route = route
        self._box = route.box
        self._console = console
        self._signals = signals
        self._push = Push(writer, route.box)
        self._deadline = 0.0

    @property
    def host(self) -> str:
        """Return the destination as it calls itself."""
        return self.route.host

    @property
    def trip_ns(self) -> int:
        """Return how long one way there and back took last, with its push."""
        return self._push.trip_ns

    def check(self) -> None:
        """Raise what ends the conversation before GO."""
        self._box.check()

    def await_accept(self) -> None:
        """Wait until the destination has read the head and accepted it.

        Without a limit for HELLO: somebody may be typing a password.  Raises
        IncompatibleError, GuestError, UsageError, PipeError.
        """
        self.route.start()
        with self._saying("waiting for the destination", self.route.hint):
            self._push.until(lambda: self._box.hello is not None, _HELLO_STALL_S)
            # That shows how long it took to start, not what the pipeline holds.
            self._push.held_bytes = 0
            self._push.through()
            self._await(lambda: self._box.accepted, ACCEPT_SECONDS, "ACCEPT")

    def settle(self) -> None:
        """Wait until the destination has read all that was written.

        What the pipeline holds back is then known, and trip_ns is the time
        that the way takes with it.  What was only found out now is tried
        again from nothing: the link may just have hesitated.  Raises as
        await_accept().
        """
        before = self._push.held_bytes
        self._push.through()
        found = self._push.held_bytes
        if found > before:
            self._push.held_bytes = 0
            self._push.through()
            self._push.held_bytes = min(found, self._push.held_bytes)
            self._push.through()

    def refuse_early_ready(self) -> None:
        """Raise GuestError where READY came before END."""
        if self._box.nonce is not None:
            raise GuestError(f"{self.host}: READY came before END")

    def await_ready(self, memory_bytes: int) -> Ready:
        """Wait for READY, after END.

        memory_bytes: of the guest, which a destination that could not start
        early loads now.  Raises as await_accept().
        """
        limit_s = READY_SECONDS + memory_bytes // SLOW_BYTES_PER_SECOND
        with self._saying(f"waiting until {self.host} is ready", limit_s=limit_s):
            self._push.through()
            self._await(lambda: self._box.nonce is not None, limit_s, "READY")
        # It may have been given up since.
        self._box.check()
        if self._box.nonce is None or self._box.hello is None:
            raise GuestError(f"{self.host}: READY came without HELLO")
        return Ready(self._box.hello, self._box.nonce)

    def commit(self) -> None:
        """Say from here on what a signal hears: GO is on its way, and only the answer counts."""
        self._deadline = time.monotonic() + ANSWER_SECONDS
        self._signals.on_deferred = lambda name: self._console.say(
            f"{name}: too late, GO is out; waiting for the answer of {self.host}, "
            f"{max(self._deadline - time.monotonic(), 0):.0f} s at the most"
        )

    def await_outcome(self) -> tuple[Event, str]:
        """Wait for the answer to GO; return what it means, and why if it is doubt.

        commit() came before.  Nothing is raised: GO is out, and only the answer counts.
        """
        with (
            contextlib.suppress(BhyError),
            self._saying(f"waiting for the answer of {self.host}", limit_s=ANSWER_SECONDS),
        ):
            # Given up pushing, we still wait: the way there may be gone, as it
            # is when bhyrecv has ended, and the way back still work.
            with contextlib.suppress(BhyError):
                self._push.until(lambda: self._box.final is not None)
            self._box.wait(lambda: self._box.final is not None, self._deadline - time.monotonic())
        final = self._box.final
        if final is not None and final.word in EVENTS:
            return EVENTS[final.word], final.text
        if final is not None:
            return Event.DOUBT, f"{self.host} cannot say whether the guest ran there"
        return Event.DOUBT, self._box.lost or f"no answer came for {ANSWER_SECONDS} s"

    def _await(self, condition: Callable[[], bool], seconds: int, word: str) -> None:
        if not self._box.wait(condition, seconds):
            self._box.check()
            raise GuestError(f"{self.host}: no {word} came for {seconds} s")

    @contextlib.contextmanager
    def _saying(
        self, what: str, hint: Callable[[], str] = lambda: "", limit_s: float = math.inf
    ) -> Iterator[None]:
        """Say every 10 s what we wait for.

        A write(2) that is blocked for longer than limit_s is ended with PipeError.
        """
        start = time.monotonic()

        def say() -> None:
            seconds = time.monotonic() - start
            if seconds > limit_s:
                raise PipeError(f"{what}: given up after {seconds:.0f} s")
            self._console.say(f"{self.route.who}: {what}, for {seconds:.0f} s now{hint()}")

        with self._signals.ticking(say, _SAY_SECONDS):
            yield
