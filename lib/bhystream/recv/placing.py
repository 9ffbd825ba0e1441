"""Pages that go from the pipe into the file of the guest's memory, without a copy in this process.

    standard input --splice(2)--> a pipe of our own --splice(2)--> the file
                                                                     | mapped
                                                                     v
                                                           hashed, and compared

The kernel copies each page once, out of a pipe into the file.  Read into a buffer and written
from there, each page is copied twice.

A pipe is locked while its bytes are copied out of it, and its writer waits that long.  From pipe
to pipe no bytes are copied; so with a pipe of our own between, the writer of standard input fills
that pipe again while the file is written.

The pages are in the guest's memory before they are compared.  That loses nothing: a guest whose
stream is refused is never started, and what is hashed is what the guest would find.  The mapping
is one more way to fail: if anybody makes the file of the memory shorter, bhyrecv gets SIGBUS, and
the guest runs on at the source, as after any death of bhyrecv.  So only the memory of a waiting
hypervisor is mapped, and no file of a snapshot.

This pays only for pages that a paused guest's bhysend has given to the pipe without a copy, and
for long runs of them.  Measured with two cores: an eighth less time into memory that is allocated,
a sixteenth less into memory that is not, and a quarter less CPU time of bhysend, which no longer
spins for the pipe's lock.  Pages that bhysend has copied lie in the other CPU's cache; the copy
from there into the file takes as long as the copy into a buffer and the one into the file together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

from bhystream import commandline
from bhystream.backend.base import Target
from bhystream.errors import from_oserror
from bhystream.guest import Layout
from bhystream.memory.extent import EXTENT
from bhystream.memory.inplace import IN_PLACE_PAGES
from bhystream.memory.target import FileTarget
from bhystream.recv.reply import TimedInput
from bhystream.stream.format import Feature, Form
from bhystream.stream.reader import Body
from bhystream.stream.verify import Walk

_MIN_EXTENT_PAGES = 8


class Placer:
    """A verify.Placer for the targets that are files."""

    def __init__(
        self, name: str, walk: Walk, source: TimedInput, layout: Layout, targets: Sequence[Target]
    ) -> None:
        """name, layout: the guest's.  source: the walk's input, a pipe.

        Raises OSError if the system does not splice.
        """
        self._name = name
        self._layout = layout
        self._files = [one if isinstance(one, FileTarget) else None for one in targets]
        self._hasher = walk.hasher
        self._read_fd, self._write_fd = os.pipe()
        self._pull = partial(source.splice, self._write_fd)
        try:
            commandline.widen_pipe(self._write_fd)
            self._pull(0)
        except OSError:
            self.close()
            raise

    def takes(self, segment: int, extents: memoryview, npages: int) -> bool:
        """Say whether the pages are worth it, and their segment is a file."""
        count = len(extents) // EXTENT.size
        if npages < IN_PLACE_PAGES or npages < _MIN_EXTENT_PAGES * count:
            return False
        file = self._files[segment]
        return file is not None and file.map(self._layout.segments[segment].npages)

    def place(self, segment: int, extents: memoryview, hashes: memoryview, body: Body) -> int:
        """Place and compare as verify.Placer says.

        Raises InputOutputError, AccessError, and what Body.take() raises.
        """
        file, base = self._files[segment], self._layout.starts[segment]
        assert file is not None
        at = 0
        try:
            while body.left_bytes:
                count = body.take(self._pull)
                bad = file.place_spliced(
                    self._read_fd, count, base, extents, at, self._hasher, hashes
                )
                if bad >= 0:
                    return bad
                at += count
            file.place_zeros(base, extents)
        except OSError as error:
            raise from_oserror(error, f"write the memory of guest {self._name}") from error
        return -1

    def close(self) -> None:
        """Release the pipe and the mappings; the files stay the targets'."""
        os.close(self._read_fd)
        os.close(self._write_fd)
        for file in self._files:
            if file:
                file.unmap()


def place_by_splices(
    name: str, walk: Walk, source: TimedInput, layout: Layout, targets: Sequence[Target]
) -> Placer | None:
    """Let a Placer have the pages of a walk, if that can pay, and works here; return the Placer.

    The arguments are a Placer's.
    """
    header = walk.header
    if header.form != Form.ANSWERED or header.features & Feature.ZSTD or not source.can_splice:
        return None
    with contextlib.suppress(OSError):
        placer = Placer(name, walk, source, layout, targets)
        walk.place_by(placer)
        return placer
    return None
