"""A bhysend that is killed: python -m backend.bhyve_child BASE CONFIG POINT.

The program opens the guest g, prepares the guest, prints the record, and pauses
the guest.  The program kills itself at POINT:

    rehearsing  after the rehearsal's request is sent
    prepared    before the pause
    armed       before the pause's request is sent
    asked       after the pause's request is sent
    NAME:K      while the FPU is stored, at a step (dying.py)
    held        when the guest stands held
    releasing   after the FIFO was read once
    released    after the guest was let go, with the directory still there
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve import fifo
from bhystream.backend.bhyve.checkpoint import Checkpoint
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.hypervisors import open_host

from .bhyve_rig import ID
from .dying import Dying

POINTS = ("rehearsing", "prepared", "armed", "asked", "held", "releasing", "released")


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    base, config, point = sys.argv[1:]
    asks: list[Callable[..., None]] = [Checkpoint.request]

    def request(self: Checkpoint, *words: Any) -> None:
        is_pause = len(words) > 2
        if point == "armed" and is_pause:
            die()
        asks[0](self, *words)
        if point == ("asked" if is_pause else "rehearsing"):
            die()

    Checkpoint.request = request  # type: ignore[method-assign, assignment]
    source = BhyveSource(open_host(), "g", Path(base), config, force=False)
    print(json.dumps(dict(source.prepare(ID).record)), flush=True)
    if point == "prepared":
        die()
    if ":" in point:
        name, count = point.split(":")
        Dying(name, int(count)).install()
    held = source.pause()
    if point == "held":
        die()
    if point == "releasing":
        real = fifo.drain
        fifo.drain = lambda path, limit_s: die(real(path, 0.0))
    SnapshotDir.remove = die  # type: ignore[method-assign]
    held.resume()


if __name__ == "__main__":
    main()
