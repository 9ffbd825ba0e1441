"""The comparison of the disks here with the samples that the source has taken of the guest's.

A thread reads the disks while the guest's state is loaded, so that this makes the pause no
longer, unless the disks are slow.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence

import xxhash

from bhystream import threads
from bhystream.stream.disks import Disk, Sample
from bhystream.units import counted


class Comparison:
    """The comparison of all disks of one guest."""

    def __init__(self, paths: Mapping[str, str], sampled: Sequence[Disk], seed: int) -> None:
        """Begin to compare.

        paths: the path here for each word of -o.  sampled: as the source has sampled the
        disks; a disk without a path here is left alone.  seed: the stream's.
        """
        self._paths = paths
        self._sampled = sampled
        self._seed = seed
        self._reasons: list[str] = []
        self._thread = threading.Thread(target=self._compare, daemon=True)
        try:
            threads.start(self._thread)
        except RuntimeError:  # a limit of the system
            self._compare()

    @property
    def thread_id(self) -> int | None:
        """Return the native id of the thread that compares, None if none does."""
        return self._thread.native_id if self._thread.is_alive() else None

    def reasons(self) -> list[str]:
        """Wait for the end; return the reasons why these are not the guest's disks."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._reasons

    def _compare(self) -> None:
        for disk in self._sampled:
            path = self._paths.get(disk.name)
            if path and (why := self._difference(disk, path)):
                self._reasons.append(f"{disk.name}: {path}: {why}")

    def _difference(self, disk: Disk, path: str) -> str:
        """Return how a disk differs from the source's; "" if every sample is the same."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                differ = [one.offset_bytes for one in disk.samples if self._differs(fd, one)]
            finally:
                os.close(fd)
        except OSError as error:
            return f"cannot compare it with the source's disk: {error.strerror}"
        if not differ:
            return ""
        return (
            "it does not hold what the source's disk held when the guest was paused:"
            f" {counted(len(differ), 'sample')} of {len(disk.samples)} differ,"
            f" the first at offset {differ[0]}"
        )

    def _differs(self, fd: int, sample: Sample) -> bool:
        """Say whether a place of a disk differs from the source's.  Raises OSError."""
        at, length, hash_ = sample
        # What this host has read of a shared disk before may be old.  A device of FreeBSD has
        # no cache, and refuses the call.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, at, length, os.POSIX_FADV_DONTNEED)
        return xxhash.xxh3_64_intdigest(os.pread(fd, length, at), self._seed) != hash_
