"""One QEMU that starts at once, and the QMP socket that its guest gets at the destination.

The guest is SeaBIOS with nothing to boot, as in the backend's tests: these tests look at where the
guest runs, not at its memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from backend.qemu_rig import Rig, rigged, state_of

from .pipeline import BHYSEND, Ended, report, run


class Pair:
    """here, there: the guest's QMP sockets at both ends.  second: another QMP socket, here."""

    def __init__(self, rig: Rig) -> None:
        self.second = rig.path("second.qmp")
        self.here = rig.start("here", "-qmp", f"unix:{self.second},server=on,wait=off")
        self.pid = rig.processes["here"].pid
        self.there = str(rig.state_dir / "there.qmp")
        rig.state_dir.chmod(0o700)
        self.env = {**os.environ, "BHYSEND_STATE_DIR": str(rig.state_dir)}

    def send(self, *receiving: str) -> Ended:
        """Run bhysend with a command that receives the guest."""
        [ended] = run([*BHYSEND, f"qemu:{self.here}", *receiving], env=self.env)
        return ended

    def assert_moved(self, ended: Ended) -> None:
        assert ended.status == 0, report(ended)
        assert state_of(self.there) == "running"

    def assert_refused(self, ended: Ended, why: str) -> None:
        assert ended.status == 76, report(ended)
        assert why in ended.stderr
        assert state_of(self.here) == "running"
        assert not os.path.lexists(self.there)


@contextmanager
def paired() -> Iterator[Pair]:
    """Start the guest; after the with block end it, wherever it is."""
    with rigged() as rig:
        yield Pair(rig)
