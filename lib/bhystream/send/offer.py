"""The answered forms at the source: what is sent is offered, and waited for.

    -a        stream on standard output; answers through `bhysend -A`
    command   bhysend runs it: stream on its standard input, answers from its
              standard output

handshake.py says what the answers mean; here is how they are waited for, and
how long.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bhystream.errors import IN_DOUBT, BhyError, GuestError, PipeError, ReaderGoneError, ending
from bhystream.guest import SLOW_BYTES_PER_SECOND
from bhystream.handover.answers import Answer, Box, LostError
from bhystream.handover.handshake import (
    ACCEPT_SECONDS,
    ANSWER_SECONDS,
    READY_SECONDS,
    Event,
)
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
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                preexec_fn=_ignore,
                umask=umask,
            )
        except OSError as error:
            raise GuestError(f"cannot run {argv[0]}: {error.strerror}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stream_fd = self._process.stdin.fileno()
        self.answer_fd = self._process.stdout.fileno()

    def hang_up(self) -> None:
        """Close its standard input: it gets EOF.  Twice is no error."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

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


def _ignore() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


class Offer:
    """One stream's conversation with its destination.

    Owned by the move; close() ends it, with the status for the third stage.
    """

    def __init__(
        self, console: Console, signals: Signals, name: str, operand: str, id_: str
    ) -> None:
        """Nothing is opened yet.  name, operand: of the guest.  id_: of the stream."""
        self._console = console
        self._signals = signals
        self._who = f"guest {name}"
        self.box = Box()
        self._rendezvous = Rendezvous(self.box, id_, (name, operand), self._noise)
        self._command: Command | None = None
        self._push: Push | None = None
        self._closed = False
        self._explained = False
        self._deadline = 0.0

    def open(self, base: Path, command: Sequence[str], umask: int = AS_IT_IS) -> int:
        """Open the way back; return the descriptor that the stream goes to.

        command: of the command form, empty for -a.  umask: for it.
        """
        fd = _STDOUT
        if command:
            self._command = Command(command, umask)
            fd = self._command.stream_fd
            self._rendezvous.read(self._command.answer_fd)
        self._rendezvous.listen(base)
        return fd

    @property
    def answer_fd(self) -> int:
        """Return where a command's answers come from, -1 for -a: the keeper gets it too."""
        return self._command.answer_fd if self._command else -1

    @property
    def host(self) -> str:
        """Return the destination as it calls itself."""
        return self.box.hello.host if self.box.hello else "the destination"

    @property
    def trip_ns(self) -> int:
        """Return how long one way there and back took last, with its push."""
        return self._push.trip_ns if self._push else 0

    def begin(self, writer: Writer) -> None:
        """Wait until the destination has read the head and accepted it.

        Without a limit for HELLO: somebody may be typing a password.
        """
        self._rendezvous.start()
        self._push = Push(writer, self.box)
        with self._saying("waiting for the destination", self._hint):
            self._push.until(lambda: self.box.hello is not None, _HELLO_STALL_S)
            # That shows how long it took to start, not what the pipeline holds.
            self._push.held_bytes = 0
            self._push.through()
            self._await(lambda: self.box.accepted, ACCEPT_SECONDS, "ACCEPT")

    def settle(self) -> None:
        """Wait until the destination has read all that was written.

        What the pipeline holds back is then known, and trip_ns is the time
        that the way takes with it.  What was only found out now is tried
        again from nothing: the link may just have hesitated.
        """
        assert self._push is not None
        before = self._push.held_bytes
        self._push.through()
        found = self._push.held_bytes
        if found > before:
            self._push.held_bytes = 0
            self._push.through()
            self._push.held_bytes = min(found, self._push.held_bytes)
            self._push.through()

    def await_ready(self, memory_bytes: int) -> bytes:
        """Wait for READY, after END; return its nonce.

        memory_bytes: of the guest, which a destination that could not start
        early loads now.
        """
        assert self._push is not None
        limit_s = READY_SECONDS + memory_bytes // SLOW_BYTES_PER_SECOND
        with self._saying(f"waiting until {self.host} is ready", limit_s=limit_s):
            self._push.through()
            self._await(lambda: self.box.nonce is not None, limit_s, "READY")
        # It may have been given up since.
        self.box.check()
        assert self.box.nonce is not None
        return self.box.nonce

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
        assert self._push is not None
        with (
            contextlib.suppress(BhyError),
            self._saying(f"waiting for the answer of {self.host}", limit_s=ANSWER_SECONDS),
        ):
            # Given up pushing, we still wait: the way there may be gone, as it
            # is when bhyrecv has ended, and the way back still work.
            with contextlib.suppress(BhyError):
                self._push.until(lambda: self.box.final is not None)
            self.box.wait(lambda: self.box.final is not None, self._deadline - time.monotonic())
        final = self.box.final
        if final is not None and final.word in EVENTS:
            return EVENTS[final.word], final.text
        if final is not None:
            return Event.DOUBT, f"{self.host} cannot say whether the guest ran there"
        return Event.DOUBT, self.box.lost or f"no answer came for {ANSWER_SECONDS} s"

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
            self._explained = True
            return GuestError(f"{self._command.words}: it {ending(status)}")
        return error

    def close(self, status: int) -> None:
        """End the conversation.  Twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._rendezvous.close(status)
        self.box.close()
        if self._command:
            # One that waits for a password does not hear that its input ends.
            hurry = self.box.hello is None or status == IN_DOUBT
            ended = self._command.end(_SHORT_SECONDS if hurry else _END_SECONDS)
            if ended and not self._explained and self.box.final is None:
                self._console.say(f"{self._command.words}: it {ending(ended)}")

    def _await(self, condition: Callable[[], bool], seconds: int, word: str) -> None:
        if not self.box.wait(condition, seconds):
            self.box.check()
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
            self._console.say(f"{self._who}: {what}, for {seconds:.0f} s now{hint()}")

        with self._signals.ticking(say, _SAY_SECONDS):
            yield

    def _hint(self) -> str:
        if self.box.hello is not None or self._command:
            return ""
        return "; is there a `| bhysend -A` at the end?"

    def _noise(self, line: bytes) -> None:
        """Show what a login shell said before the first answer."""
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))


def hello_of(offer: Offer) -> Answer:
    """Return the destination's HELLO, which has come."""
    assert offer.box.hello is not None
    return offer.box.hello
