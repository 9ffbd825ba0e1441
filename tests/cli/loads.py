"""Run a program, and say at its end which modules were loaded after a point.

    python loads.py send.custody.Custody.pause -- bhysend guest cat

The point is the first call of the method.  The line on standard error begins with "loaded:".
"""

from __future__ import annotations

import atexit
import importlib
import runpy
import sys
from functools import wraps
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> None:
    """Mark the method that stands before --, and run the program that stands after it."""
    owner, _, method = argv[1].rpartition(".")
    module, _, name = owner.rpartition(".")
    cls = getattr(importlib.import_module(f"bhystream.{module}"), name)
    real = getattr(cls, method)
    before: set[str] = set()

    @wraps(real)
    def marked(*args: Any, **named: Any) -> Any:
        if not before:
            before.update(sys.modules)
            atexit.register(say)
        return real(*args, **named)

    def say() -> None:
        loaded = sorted(set(sys.modules) - before)
        sys.stderr.write(f"loaded: {' '.join(loaded)}\n")

    setattr(cls, method, marked)
    program = argv[3]
    sys.argv = argv[3:]
    # Python would search this directory first if it had been started with the program itself.
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv)
