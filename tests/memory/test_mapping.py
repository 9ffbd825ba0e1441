"""Mappings released while views of them are in use, or not."""

from __future__ import annotations

import mmap

import pytest

from bhystream.memory.mapping import unmap


def test_a_view_and_its_mapping_are_given_up() -> None:
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    view = memoryview(mapping)
    unmap([view], [mapping])
    assert mapping.closed
    with pytest.raises(ValueError, match="released"):
        view.tobytes()
    unmap([view], [mapping])  # a second call is no error


def test_what_is_still_looked_at_stays_and_the_rest_goes() -> None:
    mappings = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(2)]
    views = [memoryview(mapping) for mapping in mappings]
    held = views[0][:1]
    unmap(views, mappings)
    assert held.tobytes() == b"\0"
    assert [mapping.closed for mapping in mappings] == [False, True]
    held.release()
