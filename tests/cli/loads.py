"""Run a program, and say at its end which modules were loaded after a point.

    python loads.py send.custody.Custody.pause -- bhysend guest cat

The point is the first call of the method.  The line on standard error begins with "loaded:".
"""

from __future__ import annotations

import atexit
import importlib
import sys
from functools import wraps
from typing import Any

from cli.limited import become


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
    become(argv[3:])


if __name__ == "__main__":
    main(sys.argv)
