"""Files that a test plants where a program expects another kind of file."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def fifo(path: Path) -> None:
    """Make a FIFO."""
    os.mkfifo(path)


def listener(path: Path) -> None:
    """Make the socket of a listener that is gone; the path may be longer than a socket's."""
    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)
