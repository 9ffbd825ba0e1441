"""The push: what pipelines hold back is pressed through with PAD sections.

A filter may keep bytes until more come: by default zstd keeps 9 MB, mbuffer
4 MiB.  So a section that the destination is to act on now may lie in a buffer
between, for ever.  Random bytes behind it press it through; zeros would not,
because zstd makes nothing of them.

How much it takes is learned before the pause, after the head and after round
0, and then written at once where it matters.  A pipeline that holds everything
until EOF is found out there too, while the guest runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from bhystream.errors import UsageError
from bhystream.handover.answers import Box
from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from bhystream.stream.writer import Writer
from bhystream.units import NS

MAX_BYTES = 64 << 20
# A destination that reads says so every 500 ms: this long without a word, and
# the bytes lie somewhere.
_PATIENCE_S = 0.6
_FIRST_BYTES = 64 << 10
_STALL_S = 10.0
_CURE = """\
a filter that waits for EOF cannot stand between (sponge, mbuffer -P);
or nobody answers: is `| bhysend -A` at the end, and bhyrecv started?
the plain form, without -a, needs no answers"""


class Push:
    """Presses one stream through its pipeline.

    held_bytes: of PAD that it takes.  trip_ns: how long the last push took,
    until the destination's word was here.
    """

    def __init__(self, writer: Writer, box: Box) -> None:
        """Both stay the caller's."""
        self._writer = writer
        self._box = box
        self.held_bytes = 0
        self.trip_ns = 0

    def through(self) -> None:
        """Return when the destination has read all that was written so far.

        Raises UsageError if the pipeline holds it back; what check() of the box
        raises; PipeError.
        """
        last = self._writer.sequence - 1
        self.until(lambda: self._box.seen >= last)

    def until(self, condition: Callable[[], bool], stall_s: float = _STALL_S) -> None:
        """Write PAD until a condition on the box holds.

        stall_s: given up when MAX_BYTES were written and so long nothing more
        came back.  Raises as through().
        """
        start_ns = time.monotonic_ns()
        pushed, step = 0, _FIRST_BYTES
        while pushed < self.held_bytes and not condition():
            part = min(self.held_bytes - pushed, fmt.CAPS[Type.PAD])
            self.pad(part)
            pushed += part
        since_ns = start_ns
        while not condition():
            if self._flows(condition):
                since_ns = time.monotonic_ns()
                continue
            self._box.check()
            if pushed < MAX_BYTES:
                step = min(step, MAX_BYTES - pushed)
                self.pad(step)
                pushed += step
                step *= 2
                since_ns = time.monotonic_ns()
            elif time.monotonic_ns() - since_ns > stall_s * NS:
                raise UsageError(
                    f"the pipeline holds bytes back until EOF: {pushed >> 20} MiB went in, "
                    "and nothing comes out",
                    _CURE,
                )
        self.held_bytes = max(self.held_bytes, pushed)
        self.trip_ns = time.monotonic_ns() - start_ns

    def _flows(self, condition: Callable[[], bool]) -> bool:
        """Wait a while; say whether anything came back.

        SEEN of what was seen before, too: the destination waits for its
        hypervisor, and reads nothing meanwhile.
        """
        told = self._box.told
        return self._box.wait(lambda: condition() or self._box.told > told, _PATIENCE_S)

    def pad(self, count: int) -> None:
        """Write so many random bytes as PAD sections."""
        while count > 0:
            part = min(count, fmt.CAPS[Type.PAD])
            self._writer.section(Type.PAD, os.urandom(part))
            count -= part
