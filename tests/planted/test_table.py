"""The table of bugs fits the sources and the tests as they are now; .ci/lint checks it too."""

from __future__ import annotations

import ast
from pathlib import Path

from planted.bug import PACKAGE, ROOT, Kind
from planted.bugs import BUGS


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_bug_can_be_planted() -> None:
    for bug in BUGS:
        made = bug.planted((ROOT / PACKAGE / bug.file).read_text())
        if not bug.is_compiled:
            ast.parse(made, bug.file)


def test_each_test_is_there() -> None:
    for file, name in {tuple(test.split("::")) for bug in BUGS for test in bug.tests}:
        assert name.partition("[")[0] in defined_in(ROOT / "tests" / file), f"{file}::{name}"


def test_only_the_tests_that_need_freebsd_are_said_to() -> None:
    for bug in BUGS:
        assert bug.tests
        assert {test.startswith("bhyve/") for test in bug.tests} == {bug.needs_freebsd}, bug.name


def test_each_kind_has_bugs() -> None:
    assert {bug.kind for bug in BUGS if not bug.needs_freebsd} == set(Kind)


def test_the_names_are_all_different() -> None:
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
