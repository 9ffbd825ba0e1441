"""Run a program with shorter limits, so that a test need not wait for the real limits.

    python limited.py handover.handshake.ANSWER_SECONDS=2 send.flush._STALL_S=1 -- bhysend -a guest

The modules are bhystream's.  handshake's limits are patched before any other module is imported,
because other modules import them by name.  The programs themselves have no option for this.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def _is_late(setting: tuple[str, str, str]) -> bool:
    return not setting[0].startswith("handover.handshake.")


def main(argv: list[str]) -> None:
    """Patch the limits that stand before --, and run the program that stands after it."""
    at = argv.index("--")
    settings = [word.partition("=") for word in argv[1:at]]
    for name, _, value in sorted(settings, key=_is_late):
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(f"bhystream.{module}")
        setattr(found, attribute, type(getattr(found, attribute))(value))
    become(argv[at + 1 :])


def become(argv: list[str]) -> None:
    """Run a program in this process, as if Python had been started with it."""
    program = argv[0]
    sys.argv = argv
    # Python would search this directory first if it had been started with the program itself.
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv)
