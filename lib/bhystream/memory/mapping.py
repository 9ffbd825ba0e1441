"""Release mappings, even if other code still has views of them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable


def unmap(views: Iterable[memoryview], mappings: Iterable[mmap.mmap]) -> None:
    """Release the views, and close their mappings.

    A mapping of which other code still has a view stays open until that view
    is dropped; this raises nothing then.
    """
    for view in views:
        with contextlib.suppress(BufferError):
            view.release()
    for mapping in mappings:
        with contextlib.suppress(BufferError):
            mapping.close()
