"""What a process inherits from whatever started it, set to what our programs are written for.

A shell, cron, a service manager or another program leaves more to a program
than words and an environment, and what it leaves may change the meaning of
ours: with SIGCHLD ignored no exit status is ever seen, with SIGALRM blocked no
limit of time works, with a descriptor that does not block a slow reader is an
error, and the first file that is opened would be a closed standard stream.
So each program begins with take(), and nothing else has to know of it.

What is the operator's to say stays: HUP, INT, QUIT, TERM and the terminal's
stops that are ignored, and the umask of the operator's own commands.

Files, arguments and records are bytes, whatever the locale: Python's UTF-8
mode reads them as UTF-8 and keeps what is none.  A locale that is read in
another way takes a second start of the interpreter, in the same process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from bhystream.errors import from_oserror

# How a closed standard stream is opened: reading and writing fail as before,
# but nobody's file gets its number.  Nothing is asked of standard error.
_STANDARD = ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR))
# Ignored on purpose (nohup, a background job), or by Python itself.
_KEPT = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGPIPE,
        signal.SIGXFSZ,
    }
)
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_UMASK = 0o077
_FILES = 4096
# What cripples a process that reaches it, and what ends it.
_RAISED = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_MEMLOCK)
_DEADLY = ((resource.RLIMIT_CPU, "CPU time", "-t"), (resource.RLIMIT_FSIZE, "file size", "-f"))


@dataclass(frozen=True)
class Inherited:
    """What was found, and is owed to others.

    umask: for the operator's own commands.  nonblocking: standard streams
    that others may share, by their descriptors.
    """

    umask: int
    nonblocking: tuple[int, ...]


def program(module: str) -> list[str]:
    """Return the words that run a program of ours, as take() would have it."""
    return [sys.executable, "-X", "utf8", "-P", "-m", f"bhystream.{module}"]


@contextlib.contextmanager
def taken() -> Iterator[Inherited]:
    """Be as our programs expect to be; give back at the end what others share."""
    found = take()
    try:
        yield found
    finally:
        for fd in found.nonblocking:
            _set_nonblocking(fd, True)


def take() -> Inherited:
    """Set what was inherited.  Main thread only, before anything else.

    It may begin the program again, see above.  Raises a BhyError where a
    closed standard stream cannot be opened.
    """
    _open_closed()
    _read_as_bytes()
    _reset_signals()
    _raise_limits()
    umask = os.umask(_UMASK)
    shared = tuple(fd for fd, _ in _STANDARD if not os.get_blocking(fd))
    for fd in shared:
        _set_nonblocking(fd, False)
    return Inherited(umask, shared)


def deadly_limit() -> str:
    """Return which limit would end a guest that is started here, and the cure; "" if none."""
    for number, name, option in _DEADLY:
        if resource.getrlimit(number)[1] != resource.RLIM_INFINITY:
            return (
                f"this process has a hard limit of {name}, which would end the guest one day;"
                f" lift it as root: ulimit -H {option} unlimited"
            )
    return ""


def _open_closed() -> None:
    for fd, mode in _STANDARD:
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            try:
                # The lowest number that is free is this one.
                opened = os.open(os.devnull, mode)
            except OSError as error:
                raise from_oserror(error, f"open {os.devnull}") from None
            os.set_inheritable(opened, True)


def _read_as_bytes() -> None:
    """Begin again in UTF-8 mode where the locale would be asked what a byte is."""
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    words = [_bytes_of(word) for word in sys.orig_argv]
    os.execv(_bytes_of(sys.executable), [words[0], b"-X", b"utf8", *words[1:]])


def _bytes_of(word: str) -> bytes:
    """Return the bytes that Python read a word from, by the locale's own rules.

    Not os.fsencode(): Python's codec of that name may differ from the C library's.
    """
    encode = ctypes.pythonapi.Py_EncodeLocale
    encode.restype = ctypes.c_char_p
    encode.argtypes = [ctypes.c_wchar_p, ctypes.c_void_p]
    found = encode(word, None)
    return os.fsencode(word) if found is None else bytes(found)


def _reset_signals() -> None:
    for timer in _TIMERS:
        signal.setitimer(timer, 0)
    for number in signal.valid_signals() - _KEPT:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _raise_limits() -> None:
    """Raise the limits as far as anybody may: hard ones are somebody's decision."""
    for number in (*_RAISED, *(number for number, _, _ in _DEADLY)):
        hard = resource.getrlimit(number)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(number, (hard, hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _set_nonblocking(fd: int, is_set: bool) -> None:
    with contextlib.suppress(OSError):
        os.set_blocking(fd, not is_set)
