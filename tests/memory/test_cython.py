"""The loops mean the same to Cython 0.29, which Debian 12 has, and to Cython 3."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LOOPS = Path(__file__).resolve().parents[2] / "lib/bhystream/memory"
SOURCES = {path.name: path.read_text() for path in sorted(LOOPS.glob("*.p[yx][xd]"))}


def vague(source: str) -> list[str]:
    """Return the C functions that do not say whether they raise.

    What such a function raises is lost with Cython 0.29, and passed on with Cython 3.  A function
    that returns an object always passes it on.
    """
    heads = re.findall(
        r"^ *cdef (?:inline )?(\w+ [*]?\w+)\(([^)]*)\)([^:\n]*)", source, re.MULTILINE
    )
    return [
        head
        for head, _, tail in heads
        if not head.startswith("object ") and not re.search(r"\b(noexcept|except)\b", tail)
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_a_c_function_says_whether_it_raises(name: str) -> None:
    assert vague(SOURCES[name]) == []


def test_a_function_that_does_not_say_it_is_seen() -> None:
    assert vague("cdef int f(\n    int x,\n) nogil:\n") == ["int f"]
    assert vague("    cdef bint *g(self):\n") == ["bint *g"]
    assert vague("cdef inline word_t h(int x) nogil:\n") == ["word_t h"]
    assert vague("cdef int f(int x) except -1:\n") == []
    assert vague("cdef void f(int x) noexcept nogil:\n") == []
    assert vague("cdef object f(int x):\n") == []
