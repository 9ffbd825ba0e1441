"""The planter tells a bug that is caught from one that is not.

`tests/planted/run` plants them all; here only a few are planted whose tests take no time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from planted.bug import Bug
from planted.bugs import BUGS
from planted.planter import Outcome, PlantingError, look, missed, not_sound
from planted.runner import main

QUICK = [bug for bug in BUGS if bug.is_quick]
SAMPLE = QUICK[0]
HERE = "planted/test_table.py::test_the_names_are_all_different"


@pytest.mark.parametrize("bug", QUICK, ids=lambda bug: bug.name)
def test_a_bug_is_caught(bug: Bug) -> None:
    assert look(bug) == []


def test_a_bug_that_no_test_sees_is_not_caught() -> None:
    assert look(replace(SAMPLE, tests=(HERE,))) == [f"{HERE}: it passes"]


def test_a_module_that_cannot_be_imported_shows_nothing() -> None:
    with pytest.raises(PlantingError, match="did not run"):
        look(replace(SAMPLE, instead="no python at all"))


def test_a_test_that_is_not_there_shows_nothing() -> None:
    with pytest.raises(PlantingError, match="did not run"):
        look(replace(SAMPLE, tests=("test_durable.py::test_nothing",)))


@pytest.mark.parametrize("text", ["not in the file", "import"])
def test_a_text_that_is_not_there_once_is_an_error(text: str) -> None:
    with pytest.raises(PlantingError, match="the text is in"):
        look(replace(SAMPLE, text=text))


def outcome(when: str, outcome: str, kind: str = "", text: str = "") -> Outcome:
    return Outcome(SAMPLE.tests[0], when, outcome, [kind] if kind else [], text)


@pytest.mark.parametrize(
    ("found", "is_caught"),
    [
        (outcome("call", "failed", "AssertionError"), True),
        (outcome("call", "failed", "Failed", "DID NOT RAISE"), True),
        (outcome("call", "failed", "Failed", "Timeout (>300.0s) from pytest-timeout."), False),
        (outcome("call", "failed", "BhyError"), True),
        (outcome("call", "failed", "NameError"), False),
        (outcome("call", "failed", "ValueError"), True),
        (outcome("setup", "failed", "AssertionError"), False),
        (outcome("setup", "skipped", "Skipped"), False),
        (outcome("call", "passed"), False),
    ],
)
def test_what_a_failure_shows(found: Outcome, is_caught: bool) -> None:
    bug = replace(SAMPLE, tests=SAMPLE.tests[:1], also=("ValueError",))
    ends = [found]
    if found.when == "call":
        ends.append(outcome("setup", "passed"))
    assert (missed(bug, ends) == []) == is_caught
    assert (not_sound(ends, bug.tests) == []) == (found.outcome == "passed")


def test_a_test_that_was_not_run_is_not_sound() -> None:
    assert not_sound([], SAMPLE.tests) == [f"{test}: it was not run" for test in SAMPLE.tests]


def test_the_table_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(f"    {bug.name}  ->  {test}" in listed for bug in BUGS for test in bug.tests)
    assert main(["no bug has such a name"]) == 2
