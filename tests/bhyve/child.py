"""Child processes for the tests of a hold.

child.py hold GUEST [CONFIG]   print the guest's record, hold the guest, and be killed
child.py resume RECORD         find a held guest by its record (JSON), and let the guest run
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys

from bhystream.backend.bhyve.source import BhyveSource
from bhystream.handover import state
from bhystream.hypervisors import open_host, open_paused


def hold(guest: str, config_path: str | None = None) -> None:
    """Hold the guest and kill this process, which closes and removes nothing itself."""
    source = BhyveSource(open_host(), guest, state.directory(), config_path, force=False)
    print(json.dumps(source.prepare(secrets.token_hex(16)).record), flush=True)
    source.pause()
    os.kill(os.getpid(), signal.SIGKILL)


def resume(record: str) -> None:
    """Let the guest run if it stands held."""
    paused = open_paused(json.loads(record))
    paused.require_paused()
    paused.resume()


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "hold":
        hold(*words)
    else:
        resume(*words)
