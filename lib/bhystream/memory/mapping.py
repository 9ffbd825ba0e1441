"""Mappings given up, whoever still looks at them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable


def unmap(views: Iterable[memoryview], mappings: Iterable[mmap.mmap]) -> None:
    """Release the views and close the mappings that they are of.

    A view that somebody else still holds keeps its mapping until it is
    dropped; that is no error here.
    """
    for view in views:
        with contextlib.suppress(BufferError):
            view.release()
    for mapping in mappings:
        with contextlib.suppress(BufferError):
            mapping.close()
