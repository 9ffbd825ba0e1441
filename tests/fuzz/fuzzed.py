"""Targets under atheris, each in a process of its own.

    python -m fuzz.fuzzed TABLE                         for runner.py: see serve()
    python -m fuzz.fuzzed TABLE TARGET [libFuzzer's options, directories and files]

TABLE: the module that has TARGETS.  It and every module of bhystream are instrumented as they are
imported: atheris learns which branches an input takes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import NoReturn

import atheris

with atheris.instrument_imports(include=["bhystream", sys.argv[1]]):
    TABLE = importlib.import_module(sys.argv[1])


def fuzz(name: str, *options: str) -> NoReturn:
    """Fuzz one target, and end the process: with 0 if nothing has failed."""
    target = {each.name: each for each in TABLE.TARGETS}[name]
    atheris.Setup([sys.argv[0], f"-max_len={target.longest}", *options], target.run)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ends the process")


def serve() -> None:
    """Fuzz what each line of standard input asks for, in a fork: modules are instrumented once.

    A line is a list in JSON: a file for the output, and fuzz()'s arguments.  Each answer is a line
    with the status of the fork.
    """
    for line in sys.stdin:
        log, *words = json.loads(line)
        child = os.fork()
        if not child:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for standard in (1, 2):
                os.dup2(fd, standard)
            fuzz(*words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fuzz(*sys.argv[2:])
    serve()
