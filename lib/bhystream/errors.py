"""The exception tree and its exit statuses.

Each kind of error has one class, whose status attribute is the exit status that
both programs return.  The statuses from 64 to 77 follow sysexits(3), and
promise something about the guest: from bhysend, that the guest runs where it
ran before, or has ended (only GuestEndedError, 69, which says so); from
bhyrecv, that nothing was started.  Two statuses lie outside that range, because
they do *not* promise this: 80 (held) and 81 (in doubt).

bhysend(8) and bhyrecv(8) print the same table; a test compares the two pages
with this module.
"""

from __future__ import annotations

import mmap
import os
import signal

EXIT_OK = 0
EXIT_HELD = 80
EXIT_IN_DOUBT = 81


class Reason(str):
    """Why a guest cannot be moved as it is, or what its move costs: one line.

    what: the reason, which begins with its key.  cure: the edit or the command that helps,
    "" if none is known.  The line joins the two.  about: the keys of the guest's
    configuration that the cure changes, for a manager that has other names for them.
    """

    __slots__ = ("about", "cure", "what")

    what: str
    cure: str
    about: tuple[str, ...]

    def __new__(cls, what: str, cure: str = "", *about: str) -> Reason:
        made = super().__new__(cls, f"{what}; {cure}" if cure else what)
        made.what, made.cure, made.about = what, cure, about
        return made


class BhyError(Exception):
    """Anything that the two programs report in one line and a status.

    One module raises it to another, unless a docstring names another exception.
    The text follows "bhysend: " in the shape of err(3); `hint`: what to type next.
    collected: every reason, if the error has been put together of several.
    """

    status = 70
    collected: tuple[Reason, ...] = ()

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint

    def reasons(self, who: str = "") -> tuple[Reason, ...]:
        """Return every reason that the error states, at least one.

        who: "guest web1", which the text of an error may begin with, and a reason does not.
        """
        if self.collected:
            return self.collected
        cure = "; ".join(filter(None, self.hint.splitlines()))
        return (Reason(str(self).removeprefix(f"{who}: "), cure),)


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
    """Bytes changed on the way or since: a checksum, a hash of a page or the digest differs."""


class GuestError(BhyError):
    """The guest or its hypervisor did not do what was asked."""

    status = 69


class GuestEndedError(GuestError):
    """The guest has ended: by itself, or with its hypervisor.  Nothing is left to resume."""


class StaleError(GuestError):
    """The guest is no longer what was recorded: it, or another in its place, may have run since.

    The disks may have changed then, and only the operator can decide what
    becomes of the guest.
    """


class RecordError(GuestError):
    """A record cannot be read: the record's guest may have run, or may stand paused."""


class AbortedError(BhyError):
    """The other side gave up and said so (the ABORT section)."""

    status = 69


class InternalError(BhyError):
    """A fault in bhysend or bhyrecv themselves."""

    status = 70


class InputOutputError(BhyError):
    """A read or a write failed, or the receiver is gone (EPIPE)."""

    status = 74


class ReaderGoneError(InputOutputError):
    """The process that read the stream is gone; only other sources can say why."""


class DowntimeError(BhyError):
    """The guest changes faster than bhysend can move it, and runs on at the source.

    Interrupted has the same status.
    """

    status = 75


class Interrupted(BhyError):
    """The operator, or a closed terminal, asked the program to stop; see signals.py."""

    status = 75


class IncompatibleError(BhyError):
    """A sound stream that this host cannot, or must not, take."""

    status = 76


class HeldError(BhyError):
    """The guest stands paused at the source and could not be resumed."""

    status = EXIT_HELD


class InDoubtError(BhyError):
    """The guest may or may not have run at the destination."""

    status = EXIT_IN_DOUBT


class AccessError(BhyError):
    """Permission denied."""

    status = 77


def from_oserror(error: OSError, what: str) -> BhyError:
    """Turn an OSError into the error of its class.

    what: what was being done, in the infinitive without "to": "open /x".
    Returns AccessError for EACCES and EPERM, else InputOutputError (74).
    """
    text = f"cannot {what}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return AccessError(text)
    return InputOutputError(text)


def ending(status: int) -> str:
    """Say how a process ended, as subprocess states it: "was killed by SIGKILL (signal 9)"."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name} (signal {-status})"
    except ValueError:  # most real-time signals have no name
        return f"was killed by signal {-status}"


_RESERVE_BYTES = 4 << 20
_reserve: list[mmap.mmap] = []


def keep_reserve() -> None:
    """Keep address space that as_error() gives back: a program without memory still has an end.

    Its clean-up and its report need memory too.  The pages are never touched, so they cost none.
    """
    _reserve.append(mmap.mmap(-1, _RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))


def as_error(raised: Exception) -> BhyError:
    """Return a BhyError unchanged, or make a BhyError of any other exception.

    An OSError, such as a missing file or a full disk, is not an InternalError,
    wherever it was raised.  Gives the reserve back.
    """
    while _reserve:
        _reserve.pop().close()
    if isinstance(raised, BhyError):
        return raised
    error: BhyError
    # A module that is loaded late needs memory too, and the linker has its own words for that.
    is_unmapped = isinstance(raised, ImportError) and "failed to map segment" in str(raised)
    # CPython 3.11 loses the MemoryError of an import that gets no memory.
    is_lost = isinstance(raised, SystemError) and "without exception set" in str(raised)
    if is_unmapped or is_lost or isinstance(raised, MemoryError):
        return GuestError("there is not enough memory", "allow more (ulimit -v), or free some")
    if isinstance(raised, OSError):
        name = raised.filename
        what = f"use {os.fsdecode(name)}" if isinstance(name, str | bytes) else "go on"
        error = from_oserror(raised, what)
    else:
        error = InternalError(f"unexpected {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error
