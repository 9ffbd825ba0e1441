"""The end of a suspended guest, which the stand-in's watch over the node must not disturb."""

from __future__ import annotations

import os
from pathlib import Path

from .rig import Rig, Spec

# Python runs sitecustomize when it starts: this one delays the second unlink of a destruction.
SLOW = """
import time
from pathlib import Path
whole = Path.unlink
def slow(self, *words, **more):
    if self.name.endswith(".map"):
        time.sleep(0.3)
    return whole(self, *words, **more)
Path.unlink = slow
"""


def test_a_slow_destruction_is_not_taken_for_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with Rig() as host:
        console = host.directory / "console"
        config = host.write_config("g", Spec(), console)
        guest = host.run("-k", str(config), "g", name="g", console=console, PYTHONPATH=paths)
        guest.console.await_beats(1)
        host.suspend("g")
        assert guest.await_exit() == 5
        assert os.listdir(host.directory / "vmm") == []
