"""The pre-copy policy: go on, stop and copy, or give up.

Pure functions of statistics: the engine measures, these functions decide, and
a test can ask for a decision without a guest.

Pre-copy pays if fewer pages change during a round than the round sent.  The
policy estimates what is left for the pause after round n from what round n
found: D pages had changed since round n-1 began, an exposure of E seconds.  The
last walk begins now, an exposure of e seconds after round n began, so the walk
will find about D * e / E pages.  A guest that changes the same pages again and
again finds fewer new pages to change as time passes: for such a guest the
estimate is too large if e is more than E, and too small if e is less.

The policy compares only the time to transfer this last set with the limit (-d).
The rest of the pause (the last scan, the device state, the destination's load)
does not get shorter by another round, so it is predicted and shown, but decides
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from bhystream.guest import PAGE_BYTES
from bhystream.units import NS


class Decision(Enum):
    """What bhysend does after a live round."""

    GO_ON = "go on"
    STOP = "stop and copy"
    GIVE_UP = "give up"


class Limits(NamedTuple):
    """What the operator allows.

    downtime_ns: time to send the last dirty set.  rounds: how many live rounds
    bhysend may send before it stops the guest or gives up.  time_ns: how long the
    live rounds may take, likewise.  finish: at these two limits stop the guest
    instead of giving up.  rate_bytes: bytes per second of the live rounds, or None.
    """

    downtime_ns: int = 300_000_000
    rounds: int = 30
    time_ns: int = 600 * NS
    finish: bool = False
    rate_bytes: int | None = None


class Round(NamedTuple):
    """What one live round measured.

    start_ns, end_ns: monotonic clock.  data_pages: sent with bytes.
    zero_pages: stated as zero.  sent_bytes: stream bytes.  write_ns: the time of
    the round in write(2), in compressing, and in waiting for -B, which grows with
    the number of pages sent, not with the size of the guest.
    """

    start_ns: int
    end_ns: int
    data_pages: int
    zero_pages: int
    sent_bytes: int
    write_ns: int


class Outlook(NamedTuple):
    """What a stop now would mean.

    last_pages: the pages expected in the last dirty set.  copy_ns: the time to send
    these pages.  scan_ns: the time to find them.
    """

    last_pages: int
    copy_ns: int
    scan_ns: int


def bandwidth_bytes(rounds: Sequence[Round], limits: Limits) -> float:
    """Return the bytes per second that the transport takes, 0.0 if unknown.

    The mean of all rounds, not the rate of the last: a short round fits into pipes
    and socket buffers, and is "sent" at the speed of memory.  At most the rate of -B.
    """
    sent = sum(r.sent_bytes for r in rounds)
    spent_ns = sum(r.write_ns for r in rounds)
    if not sent:
        return 0.0
    measured = sent * NS / max(spent_ns, 1)
    return min(measured, float(limits.rate_bytes)) if limits.rate_bytes else measured


def page_cost_bytes(rounds: Sequence[Round]) -> float:
    """Return the stream bytes that a page with bytes takes: with -z fewer than a page has."""
    pages = sum(r.data_pages for r in rounds)
    sent = sum(r.sent_bytes for r in rounds)
    return min(sent / pages, float(PAGE_BYTES)) if pages else float(PAGE_BYTES)


def outlook(rounds: Sequence[Round], npages: int, limits: Limits) -> Outlook:
    """Estimate the last dirty set and the pause that it costs.

    rounds: the live rounds so far, not empty.  npages: the guest's size.  After
    round 0 alone the rate of change is unknown, so all pages that round 0 sent are
    expected.
    """
    last = rounds[-1]
    scan_ns = max(last.end_ns - last.start_ns - last.write_ns, 0)
    if len(rounds) == 1:
        expected = last.data_pages
    else:
        exposure = max(last.start_ns - rounds[-2].start_ns, 1)
        coming = last.end_ns - last.start_ns
        changed = last.data_pages + last.zero_pages
        expected = min(npages, -(-changed * coming // exposure))
    rate = bandwidth_bytes(rounds, limits)
    copy_ns = int(expected * page_cost_bytes(rounds) * NS / rate) if rate else 0
    return Outlook(expected, copy_ns, scan_ns)


def decide(rounds: Sequence[Round], npages: int, limits: Limits, now_ns: int) -> Decision:
    """Decide what comes after a live round.

    rounds: the live rounds so far, not empty; with -r 0 there is none, and nobody
    calls decide().  npages: the guest's size.  now_ns: since the start of round 0.
    """
    at_limit = len(rounds) >= limits.rounds or now_ns >= limits.time_ns
    fits = outlook(rounds, npages, limits).copy_ns <= limits.downtime_ns
    # After round 0 alone the outlook is a guess on the large side: a second
    # round makes the pause shorter even if the guess fits the limit.
    if fits and (len(rounds) > 1 or at_limit or not rounds[0].data_pages):
        return Decision.STOP
    if at_limit:
        return Decision.STOP if limits.finish else Decision.GIVE_UP
    return Decision.GO_ON


def forecast(
    touched_pages: int, dirty_bytes: float, scan_ns: int, rate: float, limits: Limits
) -> tuple[int, int] | None:
    """Forecast a move before it begins: (live rounds, copy_ns of the last set).

    touched_pages: the pages that round 0 sends.  dirty_bytes: the bytes that the guest
    changes per second.  scan_ns: the time of one scan.  rate: bytes per second that the
    transport takes.  Returns None if bhysend would give up at the limits.
    """
    size = touched_pages * PAGE_BYTES
    pending = float(size)
    if limits.rounds == 0:
        return 0, int(size * NS / rate)
    spent_ns = 0.0
    for count in range(1, limits.rounds + 1):
        round_ns = scan_ns + pending * NS / rate
        spent_ns += round_ns
        pending = min(dirty_bytes * round_ns / NS, size)
        # The rule of decide(), which does not know the rate of change after round 0.
        at_limit = count == limits.rounds or spent_ns >= limits.time_ns
        expected = pending if count > 1 else size
        fits = expected * NS / rate <= limits.downtime_ns
        if fits and (count > 1 or at_limit or not size):
            return count, int(pending * NS / rate)
        if at_limit:
            return (count, int(pending * NS / rate)) if limits.finish else None
    return None
