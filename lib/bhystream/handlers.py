"""Where a handler of a signal may raise, and whether what it raised is still on its way.

Python calls a handler between any two instructions, and some of them are a bad place to raise:

- In an import, C code replaces the exception with an error of its own, and a module that an
  exception has left half imported may not be imported again.  So handlers ask Imports.is_in().
- In a finalizer or a callback of a weak reference, Python prints the exception or forgets it, and
  goes on.  Nothing tells such a place beforehand, so handlers look again later: is_handled().

Without this one Ctrl-C in a hundred was lost while a program started.
"""

from __future__ import annotations

import sys
import time
from types import FrameType

# How long after a signal that came at a bad place to look again.
SOON_S = 0.01
# An import that takes longer may never end, as on a file system that hangs.
_IMPORT_S = 1.0
# An import that is seen so much later than the one before is another one.
_OTHER_S = 0.3
_IMPORT = "<frozen importlib._bootstrap>"


class Imports:
    """The imports in which no handler raises."""

    def __init__(self) -> None:
        """Begin; none has been seen."""
        self._since_s = self._seen_s = 0.0

    def is_in(self, frame: FrameType | None) -> bool:
        """Say whether a module is being imported in a handler's frame, or in one that waits for it.

        An import that a handler has seen for a second does not count any more.
        """
        while frame is not None and frame.f_code.co_filename != _IMPORT:
            frame = frame.f_back
        if frame is None:
            return False
        now_s, before_s = time.monotonic(), self._seen_s
        self._seen_s = now_s
        if now_s - before_s > _OTHER_S:
            self._since_s = now_s
        return now_s - self._since_s < _IMPORT_S


def is_handled(error: BaseException) -> bool:
    """Say whether an except or finally clause has this exception now, or one that came of it."""
    found, seen = sys.exc_info()[1], set[int]()
    while found is not None and found is not error and id(found) not in seen:
        seen.add(id(found))  # code that raises an older exception again can make a circle of them
        found = found.__context__
    return found is error
