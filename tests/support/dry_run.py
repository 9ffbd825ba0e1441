"""A dry run of a guest of the stand-in: its words, and the modules that it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# bhysend, which writes the names of the modules that it has loaded behind its messages.
_PROGRAM = """
import sys
from bhystream.send.main import main
status = main()
print("modules:", *sys.modules, file=sys.stderr)
sys.exit(status)
"""


def loaded(config: Path, options: str) -> list[str]:
    """Return the modules that `bhysend OPTIONS -C CONFIG g` has loaded, the first one first."""
    words = [sys.executable, "-c", _PROGRAM, "-C", str(config), options, "g"]
    ended = subprocess.run(words, capture_output=True, check=True)
    *_, last = ended.stderr.decode().splitlines()
    head, *names = last.split()
    assert head == "modules:"
    return names
