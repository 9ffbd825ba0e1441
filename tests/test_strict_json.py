"""JSON is read by strict_json alone, because json.loads() may raise RecursionError."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bhystream import strict_json

LIB = Path(strict_json.__file__).parent
# They read what another program of ours, or their own parent, has written, or catch
# RecursionError.
OTHERS = {
    "strict_json.py",
    "backend/bhyve/freebsd_announce.py",
    "backend/bhyve/vmshim.py",
    "send/experience.py",
    "send/keeper.py",
    "send/rendezvous.py",
}


def test_a_text_that_nests_deep_is_a_text_that_cannot_be_read() -> None:
    assert strict_json.loads(b'{"a": [1.5]}') == {"a": [1.5]}
    for text in ("[" * 100_000, "{", "", b"\xff"):
        with pytest.raises(ValueError):  # JSONDecodeError and UnicodeDecodeError too
            strict_json.loads(text)


def test_no_other_module_reads_json_itself() -> None:
    for path in LIB.rglob("*.py"):
        name = str(path.relative_to(LIB))
        if name in OTHERS or name.startswith("standin/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Attribute) and node.attr in ("loads", "load")
            assert not (is_call and ast.unparse(node).startswith("json.")), path
