"""Set what a process inherits from its parent to what our programs are written for.

A shell, cron, a service manager or another program passes more to its child than
arguments and an environment, and some of it would break our programs: if
SIGCHLD is ignored, no exit status is ever seen; if SIGALRM is blocked, no time
limit works; if a descriptor does not block, a slow reader is an error; if a
standard stream is closed, the first file that is opened takes its number.  So
each program begins with take(), and no other module has to know about this.

What the operator decides stays: HUP, INT, QUIT, TERM and the terminal's stops
stay ignored if they were, and the operator's own commands get the old umask.

Files, arguments and records are bytes, whatever the locale: Python's UTF-8
mode reads them as UTF-8, and keeps bytes that are not UTF-8.  In a locale of
another encoding, take() starts the interpreter once more, in the same process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

from bhystream.errors import from_oserror
from bhystream.signals import deliver

# How a closed standard stream is opened: reading and writing fail as before, but
# no file gets the stream's number.  What is written to standard error is dropped.
_STANDARD = ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR))
# Signals that a parent ignores on purpose (nohup, a background job), or that Python ignores.
_OPERATORS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_KEPT = frozenset(
    {
        *_OPERATORS,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGPIPE,
        signal.SIGXFSZ,
    }
)
# Words before a command.  The shell becomes the command when it reads a line from standard input,
# and ends without it at the end of that input, as when its parent has died.
GATE = ("/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh")
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_UMASK = 0o077
_FILES = 4096
# The limits that cripple a process which reaches them, and those that end the process.
_RAISED = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_MEMLOCK)
_DEADLY = ((resource.RLIMIT_CPU, "CPU time", "-t"), (resource.RLIMIT_FSIZE, "file size", "-f"))


class Inherited(NamedTuple):
    """What take() found, and others still need.

    umask: for the operator's own commands.  nonblocking: the descriptors of the
    standard streams that did not block; other processes may share them.
    """

    umask: int
    nonblocking: tuple[int, ...]


def program(module: str) -> list[str]:
    """Return the words that run one of our programs, with the options that take() would add."""
    return [sys.executable, "-X", "utf8", "-P", "-m", f"bhystream.{module}"]


@contextlib.contextmanager
def taken() -> Iterator[Inherited]:
    """Call take(); at the end, give shared descriptors back as they were.  Raises as take()."""
    found = take()
    try:
        yield found
    finally:
        for fd in found.nonblocking:
            _set_nonblocking(fd, True)


def take() -> Inherited:
    """Set what was inherited.  Main thread only, before anything else.

    May start the program once more, see above.  Raises AccessError or
    InputOutputError if a closed standard stream cannot be opened.
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


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """Let a program that is started in this block heed HUP, INT, QUIT and TERM again.

    A signal that is ignored stays so across exec(2), and a hypervisor lives on for months: an
    operator's nohup is not meant for it.  Here the signals do nothing, all the while.
    Only the main thread may do that: in another thread they stay ignored.
    """
    import threading  # a dry run starts nothing

    is_main = threading.current_thread() is threading.main_thread()
    numbers = _OPERATORS if is_main else ()
    ignored = [one for one in numbers if signal.getsignal(one) == signal.SIG_IGN]
    try:
        for one in ignored:
            signal.signal(one, lambda *_: None)
        yield
    finally:
        for one in ignored:
            signal.signal(one, signal.SIG_IGN)


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
                # open(2) takes the lowest free number, which is this one.
                opened = os.open(os.devnull, mode)
            except OSError as error:
                raise from_oserror(error, f"open {os.devnull}") from None
            os.set_inheritable(opened, True)


def _read_as_bytes() -> None:
    """Start the interpreter again in UTF-8 mode if the locale's encoding is not UTF-8."""
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    words = [_bytes_of(word) for word in sys.orig_argv]
    deliver()  # else a signal that came meanwhile would end with this program
    os.execv(_bytes_of(sys.executable), [words[0], b"-X", b"utf8", *words[1:]])


def _bytes_of(word: str) -> bytes:
    """Return the bytes that Python read a word from, by the locale's own rules.

    os.fsencode() does not do: Python's codec of an encoding may differ from libc's.
    """
    import ctypes

    encode = ctypes.pythonapi.Py_EncodeLocale
    encode.restype = ctypes.c_char_p
    encode.argtypes = [ctypes.c_wchar_p, ctypes.c_void_p]
    found = encode(word, None)
    return os.fsencode(word) if found is None else bytes(found)


def _reset_signals() -> None:
    for timer in _TIMERS:
        signal.setitimer(timer, 0)
    deliver()  # what waited for the timer
    for number in signal.valid_signals() - _KEPT:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _raise_limits() -> None:
    """Raise soft limits as far as the hard limits allow, which others have decided on."""
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
