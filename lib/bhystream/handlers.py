"""Handlers of signals that raise, and whose exceptions are not lost.

Python calls a handler between any two instructions, and some of them are a bad place to raise:

- In a callback of a weak reference, or in a finalizer, Python prints the exception and goes on.
- In an import some C code replaces it with an error of its own, and a module that an exception
  has left half imported may not be imported again.

The signal would be lost then: measured, one Ctrl-C in a hundred while a program starts.  So in
such a place the signal is put off: it is sent again a moment later, until it comes in a good one.
A program that goes on to its next step calls deliver() first.
"""

from __future__ import annotations

import _thread
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_LATER_S = 0.01
_IMPORT = "<frozen importlib._bootstrap>"
_PUT_OFF = "_bhystream_put_off"


class _Drops:
    """Python's reports of exceptions that it dropped."""

    def __init__(self) -> None:
        self.is_reporting = False

    def report(self, dropped: UnraisableHookArgs) -> None:
        """Put off the signal whose handler raised the exception, or report it as Python does."""
        put_off = getattr(dropped.exc_value, _PUT_OFF, None)
        if put_off is None:
            sys.__unraisablehook__(dropped)
            return
        # What a handler raised in here would be dropped too, without a report.
        self.is_reporting = True
        put_off()
        self.is_reporting = False


_drops = _Drops()
_put_off: set[int] = set()


def install(
    number: int, handle: Callable[[int], None], undo: Callable[[], None] = lambda: None
) -> None:
    """Let handle(number), which may raise, handle a signal.  Main thread only.

    undo: called if Python dropped what handle raised; undoes what handle did before.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        _put_off.discard(number)
        if _drops.is_reporting or _imports(frame):
            _send_later(number)
            return
        try:
            handle(number)
        except BaseException as raised:
            setattr(raised, _PUT_OFF, put_off)
            raise

    def put_off() -> None:
        undo()
        _send_later(number)

    sys.unraisablehook = _drops.report
    signal.signal(number, handler)


def deliver() -> None:
    """Let the handlers of the signals that are put off raise here."""
    for number in tuple(_put_off):
        signal.raise_signal(number)


def _imports(frame: FrameType | None) -> bool:
    """Say whether a module is being imported in this frame, or in one that waits for it."""
    while frame and frame.f_code.co_filename != _IMPORT:
        frame = frame.f_back
    return frame is not None


def _send_later(number: int) -> None:
    """Send a signal to the main thread, which calls this, a moment later.

    By a thread, because the one alarm timer of the process may be in use.  The module
    threading may be what is being imported.
    """
    _put_off.add(number)
    main = _thread.get_ident()

    def send() -> None:
        time.sleep(_LATER_S)
        signal.pthread_kill(main, number)

    _thread.start_new_thread(send, ())
