"""The exception tree and its exit statuses.

One class per class of error, each with the exit status that both programs
return for it.  The statuses follow sysexits(3), so 64 to 77, and promise
something about the guest: at bhysend it runs where it was, or has ended (only
GoneError, 69, which says so); at bhyrecv nothing was started.  Two statuses lie
outside, because then the guest does *not* run where it was: 80 (held) and 81
(in doubt).

bhysend(8) and bhyrecv(8) print the same table; a test compares the three.
"""

from __future__ import annotations

import os
import signal

OK = 0
HELD = 80
IN_DOUBT = 81


class BhyError(Exception):
    """Anything that the two programs report in one line and a status.

    Raised across module lines instead of any other exception.  The text is
    what follows "bhysend: " in err(3) shape; `hint` is what to type next.
    """

    status = 70

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class UsageError(BhyError):
    """The command line is wrong, or a terminal stands where a pipe must."""

    status = 64


class StreamError(BhyError):
    """The stream is broken.

    The text names the section and the offset of its first byte, in hex.
    """

    status = 65


class FormatError(StreamError):
    """A section says what bhystream(5) does not allow."""


class TruncatedError(StreamError):
    """The stream ended before its END section."""


class ChecksumError(StreamError):
    """Bytes changed on the way: a checksum, a page hash or the digest differs."""


class GuestError(BhyError):
    """The guest or its hypervisor did not do what it was asked."""

    status = 69


class GoneError(GuestError):
    """The guest has ended: by itself, or with its hypervisor.  Nothing is left to resume."""


class TakenError(GuestError):
    """Its disks may have gone on without it, with another guest of its name or by itself.

    Only the operator can say what becomes of it then.
    """


class BrokenError(GuestError):
    """A record that cannot be read: what it speaks of may have run, or may stand paused."""


class AbortedError(BhyError):
    """The other side gave up and said so (the ABORT section)."""

    status = 69


class InternalError(BhyError):
    """A fault of ours."""

    status = 70


class PipeError(BhyError):
    """A read or a write failed, or the receiver is gone (EPIPE)."""

    status = 74


class ReaderGoneError(PipeError):
    """Whoever read the stream is gone: why, others may say."""


class DowntimeError(BhyError):
    """Not now: the guest changes faster than it can be moved, and runs on.

    Also the status of an interrupt, see signals.py.
    """

    status = 75


class IncompatibleError(BhyError):
    """A sound stream that this host cannot, or must not, take."""

    status = 76


class HeldError(BhyError):
    """The guest stands paused at the source and could not be resumed."""

    status = HELD


class InDoubtError(BhyError):
    """The guest may or may not have run at the destination."""

    status = IN_DOUBT


class AccessError(BhyError):
    """Permission denied."""

    status = 77


def from_oserror(error: OSError, what: str) -> BhyError:
    """Turn an OSError into the error of its class.

    what: what was being done, in the infinitive without "to": "open /x".
    Returns AccessError for EACCES and EPERM, else PipeError (74).
    """
    text = f"cannot {what}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return AccessError(text)
    return PipeError(text)


def ending(status: int) -> str:
    """Say how a process ended, as subprocess states it: "was killed by SIGKILL (signal 9)"."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name} (signal {-status})"
    except ValueError:  # some have no name
        return f"was killed by signal {-status}"


def as_error(raised: Exception) -> BhyError:
    """Return what was raised as a BhyError: itself, or one around it.

    What the system refused, a file that is not there or a disk that is full,
    is no fault of ours, wherever it happened.
    """
    if isinstance(raised, BhyError):
        return raised
    error: BhyError
    if isinstance(raised, MemoryError):
        return GuestError("there is not enough memory", "allow more (ulimit -v), or free some")
    if isinstance(raised, OSError):
        name = raised.filename
        what = f"use {os.fsdecode(name)}" if isinstance(name, str | bytes) else "go on"
        error = from_oserror(raised, what)
    else:
        error = InternalError(f"unexpected {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error
