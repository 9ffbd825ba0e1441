"""tests/planted/run: the table of bugs, and whether each is caught."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby

from planted.bug import Bug
from planted.bugs import BUGS
from planted.planter import PlantingError, copied, look, not_sound, outcomes

ON_FREEBSD = sys.platform.startswith("freebsd")


def main(argv: Sequence[str]) -> int:
    """Run the bugs that the words name; return the exit status."""
    words = [word for word in argv if word != "--list"]
    bugs = [bug for bug in BUGS if not words or any(_has(bug, word) for word in words)]
    if not bugs:
        print("no bug has these words; --list shows all", file=sys.stderr)
        return 2
    runnable = [bug for bug in bugs if ON_FREEBSD or not bug.needs_freebsd]
    if "--list" not in argv and (wrong := _without_any(runnable)):
        print("without any bug:", *wrong, sep="\n    ")
        return 1
    uncaught = 0
    for kind, group in groupby(bugs, key=lambda bug: bug.kind):
        print(f"\n{kind.value}")
        for bug in group:
            result = "" if "--list" in argv else "not run here: it takes FreeBSD"
            why: list[str] = []
            if bug in runnable and "--list" not in argv:
                why = _look(bug)
                result = "NOT CAUGHT" if why else "caught"
            for test in bug.tests:
                print(f"    {bug.name}  ->  {test}  ->  {result}".removesuffix("  ->  "))
            for line in why:
                print(f"        {line}")
            sys.stdout.flush()
            uncaught += bool(why)
    if "--list" not in argv:
        print(
            f"\n{len(runnable)} planted, {uncaught} not caught, {len(bugs) - len(runnable)} not run"
        )
    return 1 if uncaught else 0


def _has(bug: Bug, word: str) -> bool:
    return any(word in text for text in (bug.kind.value, bug.name, bug.file))


def _without_any(bugs: Iterable[Bug]) -> list[str]:
    """Return what is wrong with the tests before any bug is planted."""
    tests = list(dict.fromkeys(test for bug in bugs for test in bug.tests))
    if not tests:
        return []
    with copied() as copy:
        try:
            return not_sound(outcomes(copy, tests), tests)
        except PlantingError as error:
            return [str(error)]


def _look(bug: Bug) -> list[str]:
    try:
        return look(bug)
    except PlantingError as error:
        return str(error).splitlines()
