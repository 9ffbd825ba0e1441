"""The push: PAD sections press through what the filters of a pipeline hold back.

A filter may keep bytes until more bytes come: by default zstd keeps 9 MB, mbuffer
4 MiB.  So a section that the destination has to act on now may stay in a filter's
buffer for ever.  Random bytes after the section press the section through; zeros
would not, because zstd compresses zeros to almost nothing.

bhysend learns before the pause, after the head and after round 0, how many bytes
this takes, and during the pause writes that many at once.  Before the pause, while
the guest runs, bhysend also finds out a pipeline that holds everything until EOF.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from bhystream.errors import UsageError
from bhystream.handover.answers import Inbox
from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from bhystream.stream.writer import Writer
from bhystream.units import NS

MAX_BYTES = 64 << 20
# A destination that reads says so every 500 ms.  If nothing comes back for this long,
# some filter holds the bytes.
_PATIENCE_S = 0.6
_FIRST_BYTES = 64 << 10
_STALL_S = 10.0
_CURE = """\
the pipeline must not contain a filter that waits for EOF (sponge, mbuffer -P);
if nobody answers: is `| bhysend -A` at the end, and is bhyrecv started?
the plain form, without -a, needs no answers"""


class Flush:
    """The push of one stream through its pipeline.

    held_bytes: the bytes of PAD that a push needs.  trip_ns: how long the last push
    took, until the destination's answer was here.  idle_ns: for how long, in all pushes,
    a filter held the bytes and nothing came back: that time says nothing about the link.
    """

    def __init__(self, writer: Writer, inbox: Inbox) -> None:
        """Know of nothing held back yet.  writer and inbox stay the caller's."""
        self._writer = writer
        self._inbox = inbox
        self.held_bytes = 0
        self.trip_ns = 0
        self.idle_ns = 0

    def through(self) -> None:
        """Push until the destination has read all that was written so far.

        Raises UsageError if the pipeline holds the stream back, what Inbox.check()
        raises if the destination gives up, and InputOutputError if a write fails.
        """
        last = self._writer.sequence - 1
        self.until(lambda: self._inbox.seen >= last)

    def until(self, condition: Callable[[], bool], stall_s: float = _STALL_S) -> None:
        """Write PAD until a condition on the inbox holds.

        stall_s: how long to wait, once MAX_BYTES are written, while nothing comes
        back.  Raises what through() raises.
        """
        start_ns = time.monotonic_ns()
        pushed, step = 0, _FIRST_BYTES
        while pushed < self.held_bytes and not condition():
            part = min(self.held_bytes - pushed, fmt.CAPS[Type.PAD])
            self.pad(part)
            pushed += part
        since_ns = start_ns
        while not condition():
            waits_ns = time.monotonic_ns()
            if self._flows(condition):
                since_ns = time.monotonic_ns()
                continue
            self.idle_ns += time.monotonic_ns() - waits_ns
            self._inbox.check()
            self._writer.require_reader()
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
        """Wait for _PATIENCE_S at most; say whether anything has come back.

        A repeated SEEN counts too: a destination that waits for its hypervisor reads
        nothing meanwhile, and says SEEN of the same section again.
        """
        told = self._inbox.told
        return self._inbox.wait(lambda: condition() or self._inbox.told > told, _PATIENCE_S)

    def pad(self, count: int) -> None:
        """Write `count` random bytes as PAD sections.  Raises InputOutputError."""
        while count > 0:
            part = min(count, fmt.CAPS[Type.PAD])
            self._writer.section(Type.PAD, os.urandom(part))
            count -= part
