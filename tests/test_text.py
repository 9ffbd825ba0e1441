"""Files are bytes: code that reads or writes text states how it handles bytes that are not text.

A number from outside must have ASCII digits only, because int() takes the digits of every script.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent / "lib/bhystream"
# The stand-in for bhyve and the demonstration have written the files that they read.
OURS = ("standin", "demo.py")
FILES = sorted(path for path in LIB.rglob("*.py") if path.relative_to(LIB).parts[0] not in OURS)


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _says(call: ast.Call) -> bool:
    """Say whether a call names an error handler, or an encoding that needs none."""
    words = {each.arg: each.value for each in call.keywords}
    given = [each.value for each in call.args if isinstance(each, ast.Constant)]
    encoding = words.get("encoding")
    is_ascii = isinstance(encoding, ast.Constant) and encoding.value == "ascii"
    return "errors" in words or is_ascii or "ascii" in given or "surrogateescape" in given


def _is_text(call: ast.Call) -> bool:
    name = _name(call)
    modes = [each.value for each in call.args if isinstance(each, ast.Constant)]
    if name in ("read_text", "write_text"):
        return "replace" not in modes
    if name == "fdopen" or (name == "open" and isinstance(call.func, ast.Name)):
        return not any(isinstance(mode, str) and "b" in mode for mode in modes)
    if name == "open":  # Path.open(); the other kinds of open() take no mode
        return modes[:1] in (["r"], ["w"], ["a"])
    return any(each.arg in ("text", "universal_newlines") for each in call.keywords)


def silent(source: str) -> list[int]:
    """Return the lines of the calls that leave the bytes to the locale, or to an exception."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    opens = [call for call in calls if _is_text(call) and not _says(call)]
    return sorted(call.lineno for call in opens)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIB)))
def test_text_says_what_becomes_of_other_bytes(path: Path) -> None:
    source = path.read_text()
    lines = source.splitlines()
    assert [lines[at - 1].strip() for at in silent(source)] == []


@pytest.mark.parametrize(
    "code",
    [
        "open(p)",
        "p.read_text()",
        "p.open('w')",
        "p.read_text('utf-8')",
        "run(x, text=True)",
        "os.fdopen(f, 'w')",
    ],
)
def test_what_leaves_it_open_is_seen(code: str) -> None:
    assert silent(code) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "open(p, 'rb')",
        "os.open(p, 0)",
        "open(p, encoding='ascii')",
        "p.read_text('utf-8', 'surrogateescape')",
        "p.read_text('utf-8', 'replace')",
        "open(p, 'w', errors='surrogateescape')",
        "run(x, encoding='utf-8', errors='replace')",
    ],
)
def test_what_says_it_is_not(code: str) -> None:
    assert silent(code) == []


# The d of a regex, isdecimal() and isdigit() take digits of every script; int() takes not all.
_ANY_DIGIT = re.compile(r"(?<!Python's )\\d|\.is(?:decimal|numeric)\(|\.isdigit\(")
_SAFE = "isascii() and"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIB)))
def test_a_digit_is_one_of_ten(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [x for x in lines if _ANY_DIGIT.search(x) and _SAFE not in x] == []
