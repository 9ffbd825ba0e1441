"""The two programs, from their first instruction of ours to their last.

A program spends its first tenth of a second on imports, and a Ctrl-C may come then, as it may
when the program ends: both must not end in a traceback, or in a status that says something else.
"""

from __future__ import annotations

import importlib

from bhystream.errors import as_error, keep_reserve
from bhystream.signals import Ended, deliver, end_early, ignore_all

# What an early signal has prevented, in the words of each program.
_NOTHING = {"send": "nothing was begun", "recv": "nothing was started here"}


def run(name: str, package: str) -> int:
    """Run a program; return its exit status.

    name: as messages begin.  package: its part of bhystream, whose main.main() runs it.
    """
    try:
        end_early(_NOTHING[package])
        keep_reserve()
        program = importlib.import_module(f"bhystream.{package}.main")
        deliver()
        return int(program.main())
    except (Ended, MemoryError, OSError, ImportError, SystemError) as raised:
        ignore_all()
        # Else main() reports it.  A program without memory fails at any line, in an import too.
        error = raised.as_error() if isinstance(raised, Ended) else as_error(raised)
        from bhystream.report import Console

        return Console(name).fail(error)
    finally:
        ignore_all()
