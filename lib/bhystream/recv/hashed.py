"""The comparison of the memory here with the hashes that the source has taken in the pause."""

from __future__ import annotations

from collections.abc import Callable

from bhystream.backend.base import Target
from bhystream.errors import ChecksumError
from bhystream.guest import Layout
from bhystream.memory.page import PageHasher
from bhystream.stream.verify import Hashes


class MemoryComparison:
    """The comparison of all pages of one guest.

    is_done: every page is what the source has.
    """

    def __init__(self, layout: Layout, seed: int) -> None:
        """layout: the guest's.  seed: the stream's."""
        self._layout = layout
        self._hasher = PageHasher(seed)
        self._first = ""
        self._npages = 0
        self.is_done = False

    def compare(
        self, target: Target, event: Hashes, where: str, on_step: Callable[[], None]
    ) -> None:
        """Compare the pages of one HASHES section.

        target: of the section's segment.  where: names the section.  on_step: called often.
        Raises what on_step() raises, OSError if the memory cannot be read, and ChecksumError,
        after the last section, if any page differs.
        """
        base = self._layout.starts[event.segment]
        found = target.differing(self._hasher, base, event.extents, event.hashes, on_step)
        if found.npages and not self._first:
            name = self._layout.segments[event.segment].name
            self._first = (
                f"{where}: page {found.first}, which is page {found.first - base} of segment"
                f" {name}, is not what the source has"
            )
        self._npages += found.npages
        if not event.is_last:
            return
        if self._first:
            raise ChecksumError(
                f"{self._first}; {self._npages} of {self._layout.npages} pages differ"
            )
        self.is_done = True
