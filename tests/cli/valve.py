"""A stage of a pipeline that passes its input on, and can be told by a signal what to pretend.

    SIGUSR1   deaf: it reads no more, and its writer finds the pipe closed; its reader hears nothing
    SIGUSR2   mute: its reader finds the end of the input; what the stage reads is lost
    SIGRTMIN  swallow: it reads on, and passes nothing more; both pipes stay open

So a connection looks of which one direction, or one end, is gone.  A tap (tap.py) can be told the
same.  DEAF, MUTE and SWALLOW are the signals.
"""

from __future__ import annotations

import os
import signal
import sys

DEAF, MUTE, SWALLOW = signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN
_CHUNK = 1 << 18


def listen() -> None:
    """Obey the signals from now on; a read(2) or write(2) under way goes on with the new file."""
    signal.signal(DEAF, _be_deaf)
    signal.signal(MUTE, _be_mute)
    signal.signal(SWALLOW, _swallow)


def _be_deaf(*_: object) -> None:
    silent, _ours = os.pipe()  # nobody ever writes into it, and it stays open
    os.dup2(silent, 0)


def _be_mute(*_: object) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)


def _swallow(*_: object) -> None:
    os.dup(1)  # keeps the pipe open
    _be_mute()


def main() -> None:
    """Pass standard input on."""
    listen()
    while data := os.read(0, _CHUNK):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(141)
